"""The compiled grammars of jobs' response formats: each is compiled once, and the last ones are kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable

from llguidance import LLTokenizer

from tasks.errors import InvalidRequest
from tasks.response_format import ResponseFormat
from worker.engine.grammar import Grammar, GrammarRefused, GrammarTokens
from worker.jobs.grammar_check import GrammarChecker
from worker.jobs.grammar_text import grammar_text, never_begins_with_blank
from worker.runtime import gil

#: Grammars that are kept, those that were refused among them. Most take less than 1 MB; the states of a hostile one
#: may take up to 40 MB.
KEPT = 32
#: Characters of a library's message in an error.
MAX_MESSAGE = 300


class Grammars:
    """Compiles the grammars of one model's jobs. Used from many threads at once, and not by the engine's."""

    def __init__(self, tokens: Callable[[], GrammarTokens | None]) -> None:
        """`tokens`: see Codec.grammar_tokens. It is called for the first job with a format."""
        self._tokens = tokens
        #: By the text of the grammar, the one used last at the end: compiled, or why it is refused.
        self._kept: OrderedDict[str, Grammar | str] = OrderedDict()
        self._kept_lock = threading.Lock()
        self._compile_lock = threading.Lock()
        self._compiler: _Compiler | None = None

    def prepare(self) -> None:
        """Read the model's tokens, which halts all threads for up to two seconds. Else the first job with a format
        does."""
        with self._compile_lock:
            self._load()

    def close(self) -> None:
        """End the process that tries grammars out."""
        with self._compile_lock:
            if self._compiler:
                self._compiler.checker.close()

    def of(self, form: ResponseFormat) -> Grammar:
        """The grammar of a job's format. Raises InvalidRequest if it is refused."""
        text = grammar_text(form, with_blank=False)
        found = self._find(text)
        if found is None:
            with gil.released(), self._compile_lock:
                found = self._find(text) or self._keep(text, self._compiled(form, text))
        if isinstance(found, str):
            raise InvalidRequest(f"response_format: {found}", detail="response_format")
        return found

    def _find(self, text: str) -> Grammar | str | None:
        with self._kept_lock:
            found = self._kept.get(text)
            if found is None or (isinstance(found, Grammar) and found.is_exhausted):
                return None
            self._kept.move_to_end(text)
            return found

    def _keep(self, text: str, found: Grammar | str) -> Grammar | str:
        with self._kept_lock:
            self._kept[text] = found
            self._kept.move_to_end(text)
            while len(self._kept) > KEPT:
                self._kept.popitem(last=False)
        return found

    def _compiled(self, form: ResponseFormat, text: str) -> Grammar | str:
        """A compiled grammar, or why it is refused."""
        compiler = self._load()
        if compiler is None:
            return "this worker's model keeps to none: leave it out"
        try:
            if not never_begins_with_blank(form):
                plain = compiler.compile(text, drops_blank=False)
                if plain.begins_with_blank():
                    return plain
            return compiler.compile(grammar_text(form, with_blank=True), drops_blank=True)
        except GrammarRefused as refused:
            return " ".join(str(refused).split())[:MAX_MESSAGE]

    def _load(self) -> _Compiler | None:
        """None for a model that keeps to no grammar."""
        if self._compiler is None and (tokens := self._tokens()):
            self._compiler = _Compiler(tokens)
        return self._compiler


class _Compiler:
    """Compiles grammars that the checker's process has compiled within its limits."""

    def __init__(self, tokens: GrammarTokens) -> None:
        self.checker = GrammarChecker(tokens)
        self._tokenizer: LLTokenizer = tokens.tokenizer()

    def compile(self, definition: str, *, drops_blank: bool) -> Grammar:
        """Raises GrammarRefused."""
        self.checker.check(definition)
        return Grammar(self._tokenizer, definition, drops_blank=drops_blank)
