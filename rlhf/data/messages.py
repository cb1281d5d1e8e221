"""Conversations: lists of messages, and what a chat template takes besides them."""


class Chat(list):
    """Messages with what their template takes besides: `tools` and `template_kwargs`, or None.

    A prompt of messages is a Chat, so all that renders it has what the row gave. The messages keep every field.
    """

    def __init__(self, messages=(), tools=None, template_kwargs=None):
        super().__init__(messages)
        self.tools, self.template_kwargs = tools, template_kwargs

    def with_messages(self, messages):
        """Other messages for the same tools and template_kwargs."""
        return Chat(messages, self.tools, self.template_kwargs)
