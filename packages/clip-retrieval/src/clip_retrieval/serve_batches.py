"""Concurrent questions, answered together: one bounded queue, one thread that computes.

While a batch is being computed, the questions that arrive wait and become the next one: an idle
server answers at once, a busy one encodes and searches for many at a time.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Generic, TypeVar

Question = TypeVar("Question")
Answer = TypeVar("Answer")

log = logging.getLogger(__name__)


class QueueFullError(Exception):
    """As many questions wait as may."""


class Batches(Generic[Question, Answer]):
    """Answers questions by `answer`, a batch at a time, in a thread of its own.

    Args:
        answer: questions -> their answers, in their order; an answer that is an exception is raised
            where its question was asked.
        waiting: questions that may wait; one more is refused.
        size: questions in a batch, at most.
    """

    def __init__(
        self,
        answer: Callable[[Sequence[Question]], Sequence[Answer | Exception]],
        *,
        waiting: int,
        size: int,
    ) -> None:
        self._answer, self._size = answer, size
        self._queue = asyncio.Queue[tuple[Question, asyncio.Future[Answer]]](waiting)
        self._thread = ThreadPoolExecutor(1, "search")

    def waiting(self) -> int:
        """Questions that wait now."""
        return self._queue.qsize()

    async def ask(self, question: Question) -> Answer:
        """Wait for the answer.

        Raises:
            QueueFullError: too many wait already.
        """
        future = asyncio.get_running_loop().create_future()
        try:
            self._queue.put_nowait((question, future))
        except asyncio.QueueFull:
            raise QueueFullError from None
        return await future

    async def run(self) -> None:
        """Answer until cancelled; the batch that is being computed is finished."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                asked = [await self._queue.get()]
                with suppress(asyncio.QueueEmpty):
                    while len(asked) < self._size:
                        asked.append(self._queue.get_nowait())
                # a client that has gone away has cancelled its future
                asked = [(question, future) for question, future in asked if not future.done()]
                if not asked:
                    continue
                questions = [question for question, _ in asked]
                answers: Sequence[Answer | Exception]
                try:
                    answers = await loop.run_in_executor(self._thread, self._answer, questions)
                except Exception as error:  # a bug: it is told to those who asked, and logged there
                    answers = [error] * len(asked)
                for (_, future), answer in zip(asked, answers, strict=True):
                    if future.done():
                        continue
                    if isinstance(answer, Exception):
                        future.set_exception(answer)
                    else:
                        future.set_result(answer)
        finally:
            self._thread.shutdown()
