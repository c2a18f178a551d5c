"""Everything a server holds, within one bound: documents, conversations, what is being read.

What is not in use goes first, the one not used for longest: conversations are forgotten, documents
of the library are read from its files again when somebody asks.
"""

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field

from kvtrim.engine.branch import Base, Branch
from kvtrim.hf.cache import Cache
from kvtrim.hf.pack import Pack

_CONVERSATIONS = 256
_SUBJECTS = 16


@dataclass(eq=False)
class Document:
    """A prompt that was read, ready to be continued by anybody who may."""

    key: Hashable
    entries: Base | Cache  # shared, or, where the method goes on evicting, copied for each
    tokens: int
    held_bytes: int
    full_bytes: int
    ids: tuple[int, ...] = ()  # its tokens, each once: saying them again may be penalised
    users: int = 0
    subjects: tuple[str, ...] = ()  # what it was asked as, where somebody routes by that

    def note_subject(self, subject: str) -> None:
        """It was asked, or read, as this."""
        if subject:
            others = [each for each in self.subjects if each != subject]
            self.subjects = (*others[1 - _SUBJECTS :], subject)

    def continuation(self, room: int) -> Branch | Cache:
        """A continuation of one's own."""
        if isinstance(self.entries, Base):
            return Branch(self.entries, room=room)
        return self.entries.copy()


@dataclass(eq=False)
class Conversation:
    """What a request has read and written behind a document, or behind nothing."""

    document: Document | None
    into: Branch | Cache
    ids: list[int] = field(default_factory=list)  # behind the document
    subject: str = ""  # as a document's

    @classmethod
    def begin(cls, document: Document | None, room: int) -> "Conversation":
        """Nothing yet, and room for so many tokens."""
        return cls(
            document, Branch(room=room) if document is None else document.continuation(room)
        )

    def expect(self, ids: list[int]) -> None:
        """Of what comes, the tokens up to these are handed over; what follows is generated."""
        if isinstance(self.into, Cache):
            self.into.expect(self.into.seen + len(ids) - len(self.ids))

    @property
    def nbytes(self) -> int:
        """Bytes of its own."""
        return self.into.nbytes if isinstance(self.into, Branch) else self.into.held_bytes


class Memory:
    """The bound, and what is held without being in use.

    Args:
        bound: in bytes.
        pack: what answers are fed by, whose empty seats count, and are given up for others.
    """

    def __init__(self, bound: int, pack: Pack | None = None):
        self.bound, self._pack = bound, pack
        self.documents: OrderedDict[Hashable, Document] = OrderedDict()
        self._idle: OrderedDict[int, Conversation] = OrderedDict()
        self._removed: list[Document] = []  # which are still in use
        self.reserved = 0  # by requests under way and what is being read

    @property
    def held_bytes(self) -> int:
        """Everything, reservations as if they were filled."""
        idle = sum(each.nbytes for each in list(self._idle.values()))  # others ask meanwhile
        idle += 0 if self._pack is None else self._pack.empty_bytes
        documents = sum(each.held_bytes for each in list(self.documents.values()))
        documents += sum(each.held_bytes for each in list(self._removed) if each.users)
        return idle + self.reserved + documents

    def subjects(self) -> set[str]:
        """All that is held, as what it was asked. From any thread."""
        named = [each.subjects for each in list(self.documents.values())]
        own = [each.subject for each in list(self._idle.values()) if each.subject]
        return {*own, *(each for names in named for each in names)}

    def known_as(self, subject: str) -> set[Hashable]:
        """The documents that were asked as this. From any thread."""
        return {e.key for e in list(self.documents.values()) if subject in e.subjects}

    def make_room(self, count: int) -> bool:
        """Let go of what is not in use until so many bytes are free; whether they are."""
        while self.held_bytes + count > self.bound:
            if self._pack is not None and self._pack.empty_bytes:
                self._pack.leave_seats()
                continue
            if self._idle:
                self._idle.popitem(last=False)
                continue
            unused = next((each for each in self.documents.values() if not each.users), None)
            if unused is None:
                return False
            del self.documents[unused.key]
        return True

    def document(self, key: Hashable) -> Document | None:
        """A document that is held, now the last used."""
        found = self.documents.get(key)
        if found is not None:
            self.documents.move_to_end(key)
        return found

    def holds(self, document: Document) -> bool:
        """Whether it has not been let go of."""
        return self.documents.get(document.key) is document

    def add(self, document: Document) -> None:
        """Hold a document, whose room was made."""
        self.documents[document.key] = document

    def forget(self, key: Hashable) -> None:
        """Let go of a document, once nobody uses it, and of the conversations about it."""
        gone = self.documents.pop(key, None)
        self._removed = [
            each for each in (*self._removed, gone) if each is not None and each.users
        ]
        for number, each in list(self._idle.items()):
            if gone is not None and each.document is gone:
                del self._idle[number]

    def remember(self, conversation: Conversation) -> None:
        """Hold a conversation that has ended for now."""
        into, length = conversation.into, len(conversation.ids)
        if isinstance(into, Branch):
            conversation.into = into.copy(length)  # without the room that was not needed
        if self.make_room(conversation.nbytes):
            self._idle[id(conversation)] = conversation
        while len(self._idle) > _CONVERSATIONS:
            self._idle.popitem(last=False)

    def resume(self, document: Document | None, ids: list[int], room: int) -> Conversation | None:
        """The conversation that has most of these tokens in common, cut back to those.

        The last token is always left to be read, since somebody wants what follows it.
        """
        best, longest = None, 0
        for each in self._idle.values():
            if each.document is not document:
                continue
            common = _common(each.ids, ids[:-1])
            whole = common == len(each.ids) or isinstance(each.into, Branch)
            if whole and common > longest:
                best, longest = each, common
        if best is None:
            return None
        if longest == len(best.ids):  # it goes on
            del self._idle[id(best)]
            if isinstance(best.into, Branch):
                best.into.room = room
            return best
        self._idle.move_to_end(id(best))
        if not isinstance(best.into, Branch):
            return None
        return Conversation(document, best.into.copy(longest, room), best.ids[:longest])


def _common(one: list[int], two: list[int]) -> int:
    """How many tokens both begin with."""
    if two[: len(one)] == one:
        return len(one)
    pairs = zip(one, two, strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(two)))
