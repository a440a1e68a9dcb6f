"""`ddk-pipe prepare`: the text of every domain into packed windows of tokens, and its split into training and validation.

The stages that need tokens call it themselves.
"""

from ddk_pipe.stages.prepare.rules import check_rules, rules_of
from ddk_pipe.stages.prepare.stage import prepare

__all__ = ["check_rules", "prepare", "rules_of"]
