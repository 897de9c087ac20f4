"""A model's chat template, before lm_eval puts thousands of prompts through it."""

from __future__ import annotations

from typing import Any

from marlinctl.errors import BadInput, UsageError
from marlinctl.system.confined import Bounds, Exceeded, confined
from marlinctl.system.files import shown

# What lm_eval makes of a task: an example as two turns, then the question.
_TURNS = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "What is 3 + 4?"},
]


def tried_template(tokenizer: Any, name: str) -> Any:
    """The template of the model `name`, which rendered a small chat in a process of its own (system/confined.py): it is a program.

    UsageError E253 where there is none or it refuses the chat, BadInput E325 where it takes too much time or memory.
    """
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        fix = "leave --apply-chat-template out (a base model has no template), or measure the instruct model"
        raise UsageError("E253", f"{name} has no chat template", where="--apply-chat-template", fix=fix)

    def render() -> Any:
        yield len(tokenizer.apply_chat_template(_TURNS, tokenize=False, add_generation_prompt=True))

    try:
        for _ in confined(render, Bounds(memory=1 << 30, cpu=10, wait=20)):
            return template
    except Exceeded as reason:
        raise BadInput(
            "E325",
            f"the model's chat template was stopped: {reason}",
            where=f"chat_template.jinja or tokenizer_config.json of {name}",
            fix="a template that does this is not to be trusted; leave --apply-chat-template out",
        ) from None
    except RuntimeError as error:  # the child's traceback: raise_exception() of the template, or its own mistake
        said = shown(str(error).strip().splitlines()[-1])
        raise UsageError(
            "E253",
            f"the chat template of {name} refuses a plain chat: {said}",
            where="--apply-chat-template",
            fix="leave --apply-chat-template out",
        ) from None
