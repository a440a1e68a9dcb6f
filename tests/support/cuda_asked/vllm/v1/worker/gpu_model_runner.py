"""The runner whose method our hook replaces."""

from typing import Any


class GPUModelRunner:
    """With that method only."""

    def _get_prompt_logprobs_dict(self, hidden_states: Any, num_scheduled_tokens: Any) -> None: ...
