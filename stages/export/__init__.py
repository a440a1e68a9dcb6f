"""`ddk-pipe export`: a run's student as a model folder to give away, with a card filled from the record.

What the record cannot know is asked for and never guessed.
"""

from ddk_pipe.stages.export.card import CardOptions
from ddk_pipe.stages.export.stage import Target, export

__all__ = ["CardOptions", "Target", "export"]
