"""Turns texts and chats into token ids with a model directory's tokenizer and chat template.

Needs the PyPI packages tokenizers and jinja2. Nothing here talks to a server.

Text of a message is never read as control: the template is rendered around placeholders, its own parts are encoded with
the special tokens that they name, and each message is encoded between them with special tokens taken as plain text. A
document that contains "<|im_end|>" therefore cannot end its own turn.
"""

import json
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Mapping, Sequence, Union

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

MAX_TEMPLATE_BYTES = 1 << 20


class ChatError(ValueError):
    """The model directory has no usable tokenizer or template, or the prompt cannot be built from the input."""


@dataclass(frozen=True)
class Tokens:
    """Text that is tokens already, as a message's content: taken over as it is."""

    ids: Sequence[int]


Content = Union[str, Tokens, Sequence[Union[str, Tokens]]]
Message = Mapping[str, object]


def _raise(message: str):
    raise jinja2.TemplateError(message)


class ChatTokenizer:
    """Tokenizer and chat template of one Hugging Face model directory. Not thread-safe."""

    def __init__(self, model_dir: Union[str, Path]):
        directory = Path(model_dir)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ChatError(f"{directory} has no tokenizer.json")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ChatError(f"{path}: {error}") from error
        self._config = self._read_json(directory / "tokenizer_config.json")
        self._template = self._read_template(directory)
        generation = self._read_json(directory / "generation_config.json")
        model = self._read_json(directory / "config.json")
        stop = generation.get("eos_token_id", model.get("eos_token_id"))
        self.stop_token_ids = [stop] if isinstance(stop, int) else list(stop or [])

    @staticmethod
    def _read_json(path: Path) -> dict:
        if not path.is_file():
            return {}
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ChatError(f"{path}: {error}") from error
        if not isinstance(value, dict):
            raise ChatError(f"{path} is no JSON object")
        return value

    def _read_template(self, directory: Path):
        path = directory / "chat_template.jinja"
        template = path.read_text(encoding="utf-8") if path.is_file() else self._config.get("chat_template")
        if template is not None and not isinstance(template, str):
            raise ChatError(f"{directory}: chat_template is no string")
        if template is not None and len(template) > MAX_TEMPLATE_BYTES:
            raise ChatError(f"{directory}: chat_template has {len(template)} characters, limit {MAX_TEMPLATE_BYTES}")
        return template

    def encode(self, text: str, special: bool = False) -> list:
        """Token ids of `text`; with `special`, special tokens in it are read as such. No begin token is added."""
        self._tokenizer.encode_special_tokens = not special
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_text(self, text: str) -> list:
        """Token ids of a plain prompt: `text`, after the begin token where the model wants one."""
        self._tokenizer.encode_special_tokens = True
        return self._tokenizer.encode(text, add_special_tokens=True).ids

    def decode(self, token_ids: Sequence[int], skip_special: bool = True) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special)

    def _token_text(self, name: str) -> str:
        token = self._config.get(name)
        return token.get("content", "") if isinstance(token, dict) else token or ""

    def render_parts(self, roles: Sequence[str]) -> list:
        """The template's text before, between and after the contents of messages with these roles."""
        if self._template is None:
            raise ChatError("the model directory has no chat template; send text or token ids instead")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise
        marks = [f"content-{secrets.token_hex(16)}" for _ in roles]
        messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks)]
        try:
            rest = environment.from_string(self._template).render(
                messages=messages, add_generation_prompt=True,
                bos_token=self._token_text("bos_token"), eos_token=self._token_text("eos_token"))
        except jinja2.TemplateError as error:
            raise ChatError(f"chat template: {error}") from error
        parts = []
        for role, mark in zip(roles, marks):
            before, found, rest = rest.partition(mark)
            if not found or mark in rest:
                raise ChatError(f"the chat template does not show the {role!r} message exactly once")
            parts.append(before)
        return parts + [rest]

    def encode_chat(self, messages: Sequence[Message]) -> list:
        """Token ids of a chat up to where the assistant's answer begins. A content is text, Tokens, or a list of both."""
        parts = self.render_parts([str(message["role"]) for message in messages])
        ids = self.encode(parts[0], special=True)
        for message, part in zip(messages, parts[1:]):
            content = message["content"]
            pieces = [content] if isinstance(content, (str, Tokens)) else list(content)
            for piece in pieces:
                ids += piece.ids if isinstance(piece, Tokens) else self.encode(piece)
            ids += self.encode(part, special=True)
        return ids

    def document_prompt(self, document: str, question: str, max_document_tokens: int) -> list:
        """Token ids of one user message: the document's first tokens, an empty line, the question."""
        if max_document_tokens < 1:
            raise ChatError(f"max_document_tokens is {max_document_tokens}, must be at least 1")
        head = Tokens(self.encode(document)[:max_document_tokens])
        return self.encode_chat([{"role": "user", "content": [head, f"\n\n{question}"]}])


class StreamDecoder:
    """Turns a stream of token ids into text, holding back characters whose bytes are not complete yet."""

    def __init__(self, tokenizer: ChatTokenizer):
        self._tokenizer = tokenizer
        self._pending = []

    def push(self, token_id: int) -> str:
        """Text that `token_id` completes, possibly empty."""
        self._pending.append(token_id)
        text = self._tokenizer.decode(self._pending)
        # A replacement character at the end is a started character, unless that has lasted longer than any encoding.
        if text.endswith("\ufffd") and len(self._pending) < 8:
            return ""
        self._pending.clear()
        return text
