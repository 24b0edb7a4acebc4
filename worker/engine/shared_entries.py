"""Entries of a pool that rows share when they show the same content: bookkeeping without tensors."""

from __future__ import annotations

from collections.abc import Hashable

#: The entry of rows without content: anything may be written there.
NO_ENTRY = 0


class SharedEntries:
    """The entry of each slot. Slots with the same content have the same entry."""

    def __init__(self) -> None:
        self._entries: dict[int, int] = {}
        #: By entry in use: its content, and the number of slots that have it.
        self._contents: dict[int, Hashable] = {}
        self._holders: dict[int, int] = {}
        self._by_content: dict[Hashable, int] = {}

    def __getitem__(self, slot: int) -> int:
        """A slot's entry; NO_ENTRY if it has none."""
        return self._entries.get(slot, NO_ENTRY)

    def __len__(self) -> int:
        """Number of entries up to the last one in use, with NO_ENTRY."""
        return max(self._contents, default=NO_ENTRY) + 1

    @property
    def used(self) -> int:
        """Number of entries in use."""
        return len(self._contents)

    def take(self, slot: int, content: Hashable) -> None:
        """Give a slot without an entry the one of this content, which is the lowest free one if no slot has it."""
        assert slot not in self._entries, "the slot has an entry"
        entry = self._by_content.get(content)
        if entry is None:
            entry = next(number for number in range(1, len(self) + 1) if number not in self._contents)
            self._contents[entry], self._by_content[content] = content, entry
        self._holders[entry] = self._holders.get(entry, 0) + 1
        self._entries[slot] = entry

    def share(self, source: int, target: int) -> None:
        """Give a slot without an entry the one that another has, if it has one."""
        if source in self._entries:
            self.take(target, self._contents[self._entries[source]])

    def move(self, source: int, target: int) -> None:
        """Give a slot without an entry the one of another."""
        if source in self._entries:
            self._entries[target] = self._entries.pop(source)

    def release(self, slot: int) -> None:
        """Free a slot's entry, unless other slots have it too."""
        entry = self._entries.pop(slot, None)
        if entry is None:
            return
        self._holders[entry] -= 1
        if not self._holders[entry]:
            del self._holders[entry], self._by_content[self._contents.pop(entry)]

    def clear(self) -> None:
        """Free all entries."""
        for slot in list(self._entries):
            self.release(slot)
