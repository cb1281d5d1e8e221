"""Plain conversations as a chat template renders them, without the copies that are made for other ones."""

COMPARED = 16


class Plain:
    """Renders messages that are a role and a content, both text, and nothing else.

    transformers copies messages into plain types first, drops fields that are None and knows thoughts by several names,
    which takes longer than the template itself and changes nothing of such messages. The first renderings are held
    against transformers' all the same; if one differs, all are left to it.
    """

    def __init__(self, tokenizer):
        self.template, self.left = _compiled(tokenizer), COMPARED

    def render(self, tokenizer, messages, *, add_generation_prompt=False):
        """The text; None where transformers is to be asked."""
        if self.template is None or not all(map(_is_plain, messages)):
            return None
        options = {"add_generation_prompt": add_generation_prompt}
        special = tokenizer.special_tokens_map
        text = self.template.render(messages=list(messages), tools=None, documents=None, **{**special, **options})
        if self.left:
            self.left -= 1
            if text != tokenizer.apply_chat_template(list(messages), tokenize=False, **options):
                self.template = None
        return text if self.template else None


def _is_plain(message):
    return (
        type(message) is dict
        and len(message) == 2
        and type(message.get("role")) is str
        and type(message.get("content")) is str
    )


def _compiled(tokenizer):
    """The template as transformers compiles it; None where the tokenizer has another way, or transformers has."""
    from jinja2 import TemplateError
    from transformers import PreTrainedTokenizerBase

    if getattr(type(tokenizer), "apply_chat_template", None) is not PreTrainedTokenizerBase.apply_chat_template:
        return None
    try:
        from transformers.utils.chat_template_utils import _compile_jinja_template

        return _compile_jinja_template(tokenizer.get_chat_template())
    except (ImportError, ValueError, TemplateError):
        return None
