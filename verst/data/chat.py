"""Conversations as tokens, rendered once and never tokenised again.

What the model generated stays the tokens it generated: to decode and encode a conversation anew between turns may split the text in
another way, and then the gradient is computed on tokens that nobody sampled. So the opening is rendered and tokenised once, and each
later turn adds only what is new. What a template puts between an assistant's last word and the next turn is derived by rendering a short
conversation whose answer is a marker, and cutting at the marker.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from verst.config.hub import model_directory
from verst.config.plan import loading
from verst.data.call_forms import JSON, PAIRS, TAGS, CallForm, Tools, asked_for
from verst.data.prompts import same_beginning
from verst.data.special import SpecialText
from verst.errors import DataError, ModelError
from verst.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_USER = Message("user", "Hello")
_SYSTEM = Message("system", "Rules")
_MARKER = "VerstMarker9b1f"  # no spaces, so that a template that trims keeps it; no text of a real template
_ANSWER = Message("assistant", _MARKER)
_TOOL = ({"type": "function", "function": {"name": "f", "description": "F.", "parameters": {"type": "object", "properties": {}}}},)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face model directory. Raises `ModelError` if there is none or it cannot be read."""
    from transformers import AutoTokenizer

    root = model_directory(path)
    if not root.is_dir():
        raise ModelError(f"model.path: {path} is not a directory; give a Hugging Face model directory, or a hub id such as org/name")
    with loading(f"model.path: {path} holds no tokenizer that transformers can read", "copy or download its tokenizer files again"):
        return AutoTokenizer.from_pretrained(str(root), local_files_only=True)


def require_vocabulary(tokens: int, path: str) -> None:
    """Raises `ModelError` if the tokenizer is of another model. Tokens added to a vocabulary may lie beyond the model's: if never used."""
    from verst.config.plan import language_part, read_config

    known = language_part(read_config(path)).get("vocab_size")
    if isinstance(known, int) and tokens > known:
        raise ModelError(
            f"model.path {path}: its tokenizer has {tokens} tokens, its config.json a vocab_size of {known}: give the tokenizer that "
            "belongs to the model"
        )


@dataclass(frozen=True, slots=True)
class _Ending:
    """What the template writes after an assistant's last word. `text` includes what follows the end of the turn, often a newline."""

    text: str
    tokens: tuple[int, ...]
    closing: int  # how many of the tokens close the turn, the end-of-turn token included; 0 if the template writes no such token


class ChatRenderer:
    """Renders conversations with a tokenizer's chat template. Special tokens in the text of a message are its text (`verst.data.special`).

    A tokenizer without a chat template (a base model) gets plain text: the contents of the messages, concatenated, with the
    beginning-of-sequence token in front if the tokenizer itself would add one. Such a model ends a turn with its end-of-sequence token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self._eos: int | None = getattr(tokenizer, "eos_token_id", None)
        added = {token: str(about.content) for token, about in tokenizer.added_tokens_decoder.items()}
        self._added = frozenset(token for token, text in added.items() if text.strip())  # blanks are text (Gemma's line feeds)
        self._special = frozenset(tokenizer.all_special_ids)
        self._text = SpecialText(tokenizer)
        self._opened = lru_cache(maxsize=256)(self._open)  # the trajectories of a group open alike
        self._continuable = lru_cache(maxsize=256)(self._require_continuable)  # by tools, which agents may make anew for each call

    @cached_property
    def end_of_turn(self) -> int | None:
        """The token that ends an assistant's turn: the template's, else the tokenizer's end-of-sequence token."""
        ending = self._ending
        return ending.tokens[ending.closing - 1] if ending.closing else self._eos

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """What an engine must stop at, beside the model's own end-of-sequence tokens."""
        return () if self.end_of_turn is None else (self.end_of_turn,)

    def opening(self, messages: Sequence[Message], tools: Tools = ()) -> NDArray[np.int32]:
        """`[T]` tokens of a conversation up to where the assistant begins to speak, read-only.

        `tools`: what the model can call, in OpenAI's form; the template tells it so.

        Raises `DataError` if the template refuses the messages, `ModelError` if it cannot tell of tools.
        """
        return self._opened(tuple(messages), _as_text(tools))

    def _open(self, messages: tuple[Message, ...], tools: str) -> NDArray[np.int32]:
        if tools:
            self._require_tools()
        tokens_T = _array(self._encode(self._render(self._hidden(messages), generate=True, tools=tools)))
        tokens_T.flags.writeable = False
        return tokens_T

    def continuation(self, messages: Sequence[Message], *, last: int | None, tools: Tools = ()) -> NDArray[np.int32]:
        """`[T]` tokens from the end of the assistant's generation to where it speaks again, with the new `messages` between.

        `last`: the token that the generation ended with. If it does not end a turn (but is of a stop string, for example), the template's
        end of turn comes first. If it opens the next turn, at which the models of some templates stop, it is not written again. Earlier
        turns stay as they were generated, also where the template would shorten them (thinking dropped from the history). `tools`: those of
        the opening.

        Raises `DataError` if the template refuses the messages, `ModelError` if it cannot be continued (see `require_continuable`).
        """
        given = _as_text(tools)
        self._continuable(given)
        rendered = self._render([_USER, _ANSWER, *self._hidden(messages)], generate=True, tools=given)
        tokens = self._encode_after(_MARKER, self._after_marker(rendered))
        return _array(tokens[self._held(tokens, last) :])

    def _held(self, tokens: list[int], last: int | None) -> int:
        """How many of the tokens behind an answer a generation that ended with `last` has written itself."""
        closing = list(self._closing)
        closes = tokens[: len(closing)] == closing
        if closes and last == self.end_of_turn:
            return len(closing)
        own = closing if closing and closes else tokens[:1]
        return own.index(last) + 1 if last in self._added and last in own else 0

    def may_fit(self, messages: Sequence[Message], tokens: int) -> bool:
        """Whether messages can be so few tokens. Told by their length alone, since to tokenize a gigabyte would take minutes."""
        return sum(len(message.content.strip()) for message in messages) <= tokens * self._longest_token

    def demonstration(self, messages: Sequence[Message], answers: Sequence[Message]) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """`[T]` tokens of a whole conversation, and the `[T]` mask of those to imitate.

        `answers` ends with an assistant's message and may hold other roles between the assistant's. The mask covers what the assistant must
        generate after `opening` or `continuation`: its content (with what the template puts around it) and the end-of-turn token.

        Raises `DataError` if `answers` is not such a conversation, `ModelError` if the template does not allow an exact mask.
        """
        if not answers or answers[-1].role != "assistant":
            raise DataError("a demonstration must end with a message of the role 'assistant'")
        pieces: list[tuple[NDArray[np.int32], bool]] = []
        given: list[Message] = []
        for message in answers:
            if message.role != "assistant":
                given.append(message)
                continue
            if pieces and not given:
                raise DataError("a demonstration has two assistant messages in a row: join them or put a user's message between")
            before = self.continuation(given, last=self.end_of_turn) if pieces else self.opening([*messages, *given])
            pieces += [(before, False), (self._answer(message), True)]
            given = []
        tokens_T = np.concatenate([tokens for tokens, _ in pieces])
        mask_T = np.concatenate([np.full(len(tokens), imitate) for tokens, imitate in pieces])
        return tokens_T, mask_T

    def decode(self, tokens: Sequence[int] | NDArray[np.int32], stop_token_ids: Sequence[int] = ()) -> str:
        """Text of a generation, without the end of turn, special or stop token it ended with. Special tokens within stay visible."""
        ids = [int(token) for token in tokens]
        closing = list(self._closing)
        if closing and ids[-len(closing) :] == closing:
            ids = ids[: -len(closing)]
        elif ids and (ids[-1] in self._special or ids[-1] in stop_token_ids or ids[-1] == self.end_of_turn):
            ids.pop()
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def require_continuable(self) -> None:
        """Raises `ModelError` unless a conversation's earlier part stays the same when turns are added, so that tokens can be appended."""
        self._continuable("")

    def _require_continuable(self, tools: str) -> None:
        for opening in ([_SYSTEM, _USER], [_USER]):
            try:
                before = self._render(opening, generate=False, tools=tools)
                after = self._render([*opening, _ANSWER, _USER], generate=True, tools=tools)
            except DataError:
                if opening[0] is _SYSTEM:  # a template without a system role is fine: its conversations have none
                    continue
                raise
            if not after.startswith(before):
                at = same_beginning(before, after)
                raise ModelError(
                    f"the chat template cannot be used for several turns: it writes the {opening[0].role} message differently once a turn "
                    f"follows ({before[at : at + 40]!r} becomes {after[at : at + 40]!r}). Use a template that only appends, or one turn "
                    "(rollout.max_turns: 1)"
                )
            self._after_marker(after)

    def _require_tools(self) -> None:
        """Raises `ModelError` unless the template tells of tools, and asks for calls in a form that can be read."""
        if not self._with_tool:
            raise ModelError(
                f"{self._name} does not tell a model of tools: use a model that was trained on them, or describe them in a message"
            )
        if asked_for(self._with_tool) is None:
            known = ", ".join(f"<tool_call>{form.example}</tool_call>" for form in (JSON, TAGS, PAIRS))
            raise ModelError(f"{self._name} asks for calls of tools in a form that cannot be read; what can: {known}")

    @cached_property
    def call_form(self) -> CallForm:
        """How the template asks a model to call tools: JSON if it tells of none."""
        return asked_for(self._with_tool) or JSON

    @cached_property
    def _with_tool(self) -> str:
        """What a short conversation becomes if there is a tool; empty if the template does not mind, or refuses it."""
        try:
            told = self._render([_USER], generate=True, tools=_as_text(_TOOL))
        except DataError:
            return ""
        with suppress(DataError):  # one that is for tools only refuses this
            return "" if told == self._render([_USER], generate=True) else told
        return told

    @cached_property
    def _ending(self) -> _Ending:
        text = self._after_marker(self._render([_USER, _ANSWER], generate=False))
        tokens = self._encode_after(_MARKER, text)
        return _Ending(text, tuple(tokens), self._closes(tokens))

    def _closes(self, tokens: list[int]) -> int:
        """How many tokens behind the last answer close its turn: up to the last added one that stands there whatever follows.

        Others end the conversation. Where what follows tells nothing (the template has one turn, writes all in another way, or always opens
        the next answer), it is the first added one.
        """
        added = [i for i, token in enumerate(tokens) if token in self._added]
        followed: list[int] = []
        with suppress(DataError, ModelError):
            if self._render([_USER], generate=False) != self._render([_USER], generate=True):
                followed = self._encode_after(_MARKER, self._after_marker(self._render([_USER, _ANSWER, _USER], generate=True)))
        same = same_beginning(tokens, followed)
        closing = max((i for i in added if i < same), default=min(added, default=None))
        return 0 if closing is None else tokens.index(tokens[closing]) + 1  # a token that is written twice is met at the first

    @cached_property
    def _closing(self) -> tuple[int, ...]:
        """Tokens a generation that stopped by itself already holds. Some templates close a turn only when another one follows."""
        if self._ending.closing:
            return self._ending.tokens[: self._ending.closing]
        return () if self._eos is None else (self._eos,)

    def _answer(self, message: Message) -> NDArray[np.int32]:
        """The tokens the model should have generated for this message: as the template writes it after the generation prompt."""
        header = self._render([_USER], generate=True)
        full = self._render([_USER, message], generate=False)
        if not full.startswith(header):
            raise ModelError(
                f"the chat template does not allow exact demonstrations: its generation prompt ends with {header[-40:]!r}, which it does "
                f"not write before an assistant's message ({full[: len(header) + 20][-60:]!r}). Use a template that does"
            )
        if self.end_of_turn is None:
            raise ModelError(
                f"neither {self._name} nor its tokenizer has an end-of-turn token: a model could not learn to stop. "
                "Set eos_token in tokenizer_config.json"
            )
        text, ending = full[len(header) :], self._ending
        if not text.endswith(ending.text):
            raise ModelError(f"the chat template ends an assistant's message in more than one way: {ending.text!r} and {text[-40:]!r}")
        if not ending.closing:
            return _array([*self._encode_after(header, text.removesuffix(ending.text)), self.end_of_turn])
        tokens = self._encode_after(header, text)
        return _array(tokens[: len(tokens) - (len(ending.tokens) - ending.closing)])

    def _after_marker(self, rendered: str) -> str:
        _, marker, rest = rendered.partition(_MARKER)
        if not marker:
            raise ModelError(
                "the chat template changes or drops an assistant's content: it cannot be used for several turns or demonstrations"
            )
        return rest

    @property
    def _name(self) -> str:
        path = self.tokenizer.name_or_path
        return f"the chat template of {path}" if path else "the chat template"

    def _render(self, messages: Sequence[Message], *, generate: bool, tools: str = "") -> str:
        if not self.has_template:
            return self._begin + "".join(message.content for message in messages)
        from jinja2 import TemplateError, TemplateSyntaxError

        conversation: list[dict[str, str]] = [{"role": message.role, "content": message.content} for message in messages]
        told: Any = {"tools": json.loads(self._text.hide(tools))} if tools else {}
        try:
            return str(self.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=generate, **told))
        except TemplateSyntaxError as error:
            raise ModelError(f"{self._name}, line {error.lineno}: {error.message}; mend or replace it (chat_template.jinja)") from error
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            roles = ", ".join(message.role for message in messages)
            raise DataError(f"{self._name} refuses messages of the roles {roles}: {error}; change the messages or the template") from error

    def _hidden(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Special tokens in their text can end no message. Without a template there are none: its one text is the user's own."""
        if not self.has_template:
            return messages
        own, others = self._written
        return [
            Message(self._text.hide(m.role, others), self._text.hide(m.content, own if m.role == "assistant" else others)) for m in messages
        ]

    @cached_property
    def _written(self) -> tuple[frozenset[str], frozenset[str]]:
        """Added tokens that the template writes itself: around a user's message, and around those of any role.

        The former are text in an assistant's message, which could open another's with them; not the latter, of which it says some itself.
        """
        found = []
        for conversation in ([_USER], [_USER, _ANSWER, _USER], [_USER, _ANSWER, Message("tool", _USER.content)]):
            with suppress(DataError):  # of a template that refuses such a conversation
                found.append(self._text.written(self._render(conversation, generate=False)))
        return (found or [frozenset()])[0], frozenset().union(*found)

    @cached_property
    def _longest_token(self) -> int:
        """Characters; of byte-level tokens bytes, which are no fewer."""
        return max(map(len, self.tokenizer.get_vocab()))

    @cached_property
    def _begin(self) -> str:
        bos: Any = self.tokenizer.bos_token_id
        adds = bos is not None and self.tokenizer.encode("a", add_special_tokens=True)[:1] == [bos]
        return str(self.tokenizer.bos_token) if adds else ""

    def _encode(self, text: str) -> list[int]:
        return self._text.encode(text)

    def _encode_after(self, before: str, text: str) -> list[int]:
        """Tokens of `text` where it follows `before`: some tokenizers mark the beginning of a text, which this is not.

        Where a token would span the border the two are tokenised apart, as they are when the model generates.
        """
        head, whole = self._encode(before), self._encode(before + text)
        return whole[len(head) :] if whole[: len(head)] == head else self._encode(text)


def _as_text(tools: Tools) -> str:
    return json.dumps(list(tools), ensure_ascii=False) if tools else ""


def _array(tokens: Sequence[int]) -> NDArray[np.int32]:
    return np.asarray(tokens, dtype=np.int32)
