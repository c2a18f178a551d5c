"""Requests that decode together: they join and leave between passes, whatever each is about.

One thread runs the model. In every round it feeds, in one pass, the last token of everybody who is
answering and tokens of questions, until it takes three times as long; then, if somebody waits for
a long document, a chunk of that. What passes take is measured, so that nobody waits for others.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Hashable
from typing import Any

from kvtrim.errors import KvtrimError
from kvtrim.hf.attach import attach
from kvtrim.hf.cache import Cache
from kvtrim.hf.pack import Feed, Pack
from kvtrim.report.format import size
from kvtrim.serve.answer import Answer, Room, Speaker
from kvtrim.serve.documents import Prints
from kvtrim.serve.library import Entry, Library
from kvtrim.serve.limits import Limits
from kvtrim.serve.memory import Conversation, Document, Memory
from kvtrim.serve.pace import Pace
from kvtrim.serve.reader import Reader
from kvtrim.serve.reading import Reading
from kvtrim.serve.request import Failed, Refused, Request, Upload

log = logging.getLogger("kvtrim.serve")


class Scheduler:
    """Runs a model for any number of requests. Start it, submit, drain it in the end."""

    def __init__(
        self, model: Any, tokenizer: Any, prints: Prints, library: Library, limits: Limits
    ):
        self.model, self.limits = model, limits
        self.reader = Reader(model, tokenizer, prints, library)
        self.speaker = Speaker.of(model, tokenizer)
        self._pack, self.pace = Pack(model), Pace()
        self.memory = Memory(limits.memory, self._pack)
        self._came: deque[Request | Upload] = deque()
        self._forgotten: deque[Hashable] = deque()
        self.waiting: deque[Request] = deque()
        self.answers: list[Answer] = []
        self.readings: deque[Reading] = deque()
        self._uploads: deque[Upload] = deque()
        self._wake, self._draining = threading.Condition(), False
        self._thread = threading.Thread(target=self._run, name="kvtrim-serve", daemon=True)

    # From any thread

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def submit(self, asked: Request | Upload) -> None:
        """Take on a request or a document.

        Raises:
            Refused: the queue is full, or the server is closing.
        """
        with self._wake:
            if self._draining:
                raise Refused("the server is closing; try again in a moment", 503, 5)
            if isinstance(asked, Upload):
                new = [each for each in self._came if isinstance(each, Upload)]
                if len(new) + len(self._uploads) >= self.limits.uploads:
                    raise Refused("many documents wait to be read; try again later", 429, 10)
            else:
                waiting = [each for each in self._came if isinstance(each, Request)]
                waiting += list(self.waiting)  # copies: the scheduler's thread goes on meanwhile
                waiting += [each for one in list(self.readings) for each in list(one.waiting)]
                queued = sum(each.count for each in waiting)
                if queued >= self.limits.queue:
                    wait = self.pace.wait_s(queued)
                    raise Refused(f"{queued} requests wait; try again later", 429, wait)
            self._came.append(asked)
            self._wake.notify()

    def forget(self, key: Hashable) -> None:
        """Let go of a document that was removed."""
        with self._wake:
            self._forgotten.append(key)
            self._wake.notify()

    def drain(self, seconds: float) -> bool:
        """Take nothing on any more and finish what is there; whether that was done in time."""
        with self._wake:
            self._draining = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def alive(self) -> bool:
        """It runs and takes requests on."""
        return self._thread.is_alive() and not self._draining

    # In the scheduler's thread

    def _run(self) -> None:
        with attach(self.model):
            while True:
                with self._wake:
                    while not (self._came or self._forgotten or self._busy or self._draining):
                        self._wake.wait()
                    came, self._came = list(self._came), deque()
                    gone, self._forgotten = list(self._forgotten), deque()
                    if self._draining and not (came or self._busy):
                        return
                for key in gone:
                    self.memory.forget(key)
                for one in came:
                    if isinstance(one, Upload):
                        self._uploads.append(one)
                    else:
                        self.waiting.append(one)
                try:
                    self._round()
                except Exception as error:  # nobody may wait for ever for a fault of ours
                    self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        """Tell everybody that this went wrong, and begin anew."""
        log.exception("the scheduler failed", exc_info=error)
        asked = [each.request for each in self.answers] + list(self.waiting)
        for reading in self.readings:
            asked += reading.waiting
            reading.failed(error)
        for request in asked:
            request.fail(error)
        for upload in self._uploads:
            upload.emit(Failed(error))
        self.answers, self.waiting = [], deque()
        self.readings, self._uploads = deque(), deque()
        self._pack.leave_seats()
        self.memory = Memory(self.limits.memory, self._pack)

    @property
    def _busy(self) -> bool:
        return bool(self.waiting or self.answers or self.readings or self._uploads)

    def _round(self) -> None:
        """Let go of who is gone, take on who fits in, and run what there is to run."""
        self._leave()
        self._admit()
        spent = self._step()
        if self.readings:
            self._read(spent)
        elif not self.answers and (self.waiting or self._uploads):
            time.sleep(0.005)  # everything waits for room; only a client that goes can give it

    def _leave(self) -> None:
        now = time.monotonic()
        for answer in list(self.answers):
            request = answer.request
            if request.gone.is_set() or now > request.deadline:
                self._late(request)
                self._close(answer, remember=not answer.reading)
        for reading in list(self.readings):
            for request in [r for r in reading.waiting if self._is_gone(r, now)]:
                reading.waiting.remove(request)
            if not reading.waiting and not reading.wanted():
                self.readings.remove(reading)
                self.memory.reserved -= reading.reserved
        self.waiting = deque(each for each in self.waiting if not self._is_gone(each, now))
        self._uploads = deque(each for each in self._uploads if not each.gone.is_set())

    def _is_gone(self, request: Request, now: float) -> bool:
        if now > request.deadline:
            self._late(request)
            return True
        return request.gone.is_set()

    def _late(self, request: Request) -> None:
        if not request.gone.is_set():
            request.fail(Refused("the request was not done by its deadline", 504))

    # Taking on

    def _admit(self) -> None:
        while self._uploads and len(self.readings) < 2:
            if not self._begin_upload(self._uploads[0]):
                break
            self._uploads.popleft()
        for _ in range(len(self.waiting)):
            placed = sum(each.request.count for each in self.answers)
            if placed and placed + self.waiting[0].count > self.limits.batch:
                return
            request = self.waiting.popleft()
            try:
                fits = self._begin(request)
            except Exception as error:
                self._fail(request, error)
                continue
            if not fits:
                self.waiting.appendleft(request)  # in the order in which they came
                return

    def _begin(self, request: Request) -> bool:
        """Give a request its place; False if there is no room for it yet."""
        document, reused = None, 0
        if request.document is not None:
            document = self._from_library(request.document)
            if document is None:
                return False
            reused = document.tokens
        elif request.head and request.how is not None:
            key = self.reader.head_key(request)
            document = self.memory.document(key)
            under_way = next((each for each in self.readings if each.key == key), None)
            if document is None and under_way is not None:
                under_way.waiting.append(request)
                return True
            if document is None:
                return self._begin_head(request, key)
            reused = 0 if request.read else document.tokens
        elif request.head:
            request.ids, request.head = request.head + request.ids, []
        return self._join(request, document, reused)

    def _join(self, request: Request, document: Document | None, reused: int) -> bool:
        tokens = len(request.ids) + request.sampling.max_tokens
        talk = self.memory.resume(document, request.ids, tokens)
        room = Room.of(request, document, self.speaker.entry_bytes)
        need = room.total(request.count)
        if document is not None:
            document.users += 1  # it stays while room is made
        if not self.memory.make_room(need):
            if document is not None:
                document.users -= 1
            if talk is not None:
                self.memory.remember(talk)
            self._require_possible(need)
            return False
        if talk is None:
            talk = Conversation.begin(document, tokens)
        talk.expect(request.ids)
        self.memory.reserved += need
        known = reused + len(talk.ids)
        self.answers.append(Answer(request, self.speaker, document, talk, known, room, need))
        return True

    def _require_possible(self, need: int) -> None:
        """Refuse what would not fit in even if it were alone.

        Raises:
            Refused: saying what it takes.
        """
        in_use = any(each.users for each in self.memory.documents.values())
        if not (self.answers or self.readings or in_use):
            raise Refused(
                f"this needs {size(need)} beside what is held, and the server may hold "
                f"{size(self.memory.bound)} in all (--memory); ask for fewer tokens, or "
                "compress more",
                413,
            )

    def _from_library(self, entry: Entry) -> Document | None:
        """A document's entries, read from its file if they are not held; None: no room yet."""
        found = self.memory.document(entry.key)
        if found is not None:
            return found
        self.reader.require_own(entry)
        if not self.memory.make_room(entry.held_bytes):
            self._require_possible(entry.held_bytes)
            return None
        found = self.reader.load(entry)
        self.memory.add(found)
        return found

    # Reading

    def _begin_head(self, request: Request, key: Hashable) -> bool:
        reading = self._place(self.reader.head(request, key))
        if reading is None:
            return False
        reading.waiting.append(request)
        return True

    def _begin_upload(self, upload: Upload) -> bool:
        """Start to read a document; True if it is under way, was found, or failed."""
        try:
            if self.reader.reuse(upload):
                return True
            reading = self._place(self.reader.upload(upload))
        except Exception as error:
            upload.emit(Failed(error))
            return True
        return reading is not None

    def _place(self, reading: Reading) -> Reading | None:
        """A prompt's place among those that are read; None if there is no room for it yet."""
        reading.reserved = len(reading.ids) * self.speaker.entry_bytes
        if not self.memory.make_room(reading.reserved):
            self._require_possible(reading.reserved)
            return None
        self.memory.reserved += reading.reserved
        self.readings.append(reading)
        return reading

    def _read(self, spent: int) -> None:
        """A chunk of the first prompt that is being read."""
        reading = self.readings[0]
        count = self.pace.chunk(bool(self.answers), spent)
        if count <= 0:
            return
        try:
            with self.pace.measure_chunk(min(count, len(reading.ids) - reading.done)):
                complete = reading.read(self.model, count)
            if not complete:
                return
            if reading.complete is not None:
                reading.complete(reading.cache)
            document = reading.document()
        except Exception as error:
            self._drop(reading)
            reading.failed(error)
            for request in reading.waiting:
                self._fail(request, error)
            return
        self._drop(reading)
        self.memory.make_room(document.held_bytes)
        self.memory.add(document)
        for number, request in enumerate(reading.waiting):
            request.read = number == 0  # the others find it read
            try:
                if not self._join(request, document, document.tokens if number else 0):
                    self.waiting.appendleft(request)
            except Exception as error:
                self._fail(request, error)

    def _drop(self, reading: Reading) -> None:
        self.readings.remove(reading)
        self.memory.reserved -= reading.reserved

    # Answering

    def _step(self) -> int:
        """One pass for all who answer; how many tokens of prompts went along."""
        left = self.pace.along(sum(not each.reading for each in self.answers))
        feeds, fed, spent = [], [], 0
        for answer in self.answers:
            ids = answer.unread()
            if answer.reading and not isinstance(answer.talk.into, Cache):
                ids = ids[: max(0, left)]  # those that evict as they go get a question whole
            if not ids:
                continue
            if answer.reading:
                left, spent = left - len(ids), spent + len(ids)
            feeds.append(Feed(answer.talk.into, ids))
            fed.append(answer)
        if not feeds:
            return 0
        try:
            tokens = sum(len(each.ids) for each in feeds)
            with self.pace.measure_step(tokens, spent > 0, lambda: self._pack.captures):
                logits = self._pack.feed(self.model, feeds)
        except Exception as error:
            for answer in fed:
                self._fail(answer.request, error)
                self._close(answer, remember=False)
            return spent
        for answer, feed, row in zip(fed, feeds, logits, strict=True):
            if answer.note_read(feed.ids):
                others = answer.fork()
                self.answers += others
                for each in (*others, answer):
                    each.extend(row)
                    if each.ended:
                        self._close(each, remember=True)
        return spent

    def _close(self, answer: Answer, remember: bool) -> None:
        self.answers.remove(answer)
        self._pack.leave(answer.talk.into)
        self.memory.reserved -= answer.release()
        if answer.document is not None:
            answer.document.users -= 1
        held = answer.document is None or self.memory.holds(answer.document)
        if remember and held and not answer.forked:  # the first answer's knows their prompt
            self.memory.remember(answer.talk)

    def _fail(self, request: Request, error: Exception) -> None:
        if not isinstance(error, KvtrimError):
            log.exception("a request failed", exc_info=error)
        request.fail(error)
