"""Requests that wait for their first step, in arrival order, and the rule that may hold them back."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from text_generation_router.scheduling.requests import QueuedRequest

TGI_WAITING_SERVED_RATIO = 0.3
TGI_MAX_WAITING_TOKENS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionHold:
    """TGI's rule for models without chunked prefill: let a batch run on until enough requests wait, or long enough.

    Off unless one of its flags was given, since a mixed step does not interrupt the running sequences.
    """

    waiting_served_ratio: float = TGI_WAITING_SERVED_RATIO
    max_waiting_tokens: int = TGI_MAX_WAITING_TOKENS

    def holds(self, *, num_waiting: int, num_running: int, waiting_tokens: int) -> bool:
        """Whether the waiting requests stay outside for one more step.

        ``waiting_tokens`` is 1 at an admission and grows with every step of nothing but decode rows and old prompts.
        """
        if num_running == 0 or waiting_tokens >= self.max_waiting_tokens:
            return False
        return num_waiting + 1 <= num_running * self.waiting_served_ratio

    def reason(self, waiting_tokens: int) -> str:
        """What opened the door, as TGI's metric calls it."""
        return "wait_exceeded" if waiting_tokens >= self.max_waiting_tokens else "backpressure"


def admission_hold(waiting_served_ratio: float | None, max_waiting_tokens: int | None) -> AdmissionHold | None:
    """The hold that the flags ask for; a flag that was not given takes TGI's default beside one that was."""
    if waiting_served_ratio is None and max_waiting_tokens is None:
        return None
    return AdmissionHold(
        waiting_served_ratio=TGI_WAITING_SERVED_RATIO if waiting_served_ratio is None else waiting_served_ratio,
        max_waiting_tokens=TGI_MAX_WAITING_TOKENS if max_waiting_tokens is None else max_waiting_tokens,
    )


class WaitingQueue:
    """First in, first out; a pre-empted request comes back at the front, since it was admitted before the others."""

    def __init__(self) -> None:
        self._requests: deque[QueuedRequest] = deque()

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[QueuedRequest]:
        return iter(self._requests)

    def append(self, queued: QueuedRequest) -> None:
        self._requests.append(queued)

    def put_back(self, queued: QueuedRequest) -> None:
        self._requests.appendleft(queued)

    def first(self) -> QueuedRequest | None:
        """The next request, left in the queue."""
        return self._requests[0] if self._requests else None

    def pop(self) -> QueuedRequest:
        return self._requests.popleft()

    def remove(self, queued: QueuedRequest) -> bool:
        """Take a request out of the middle; False when it is not waiting."""
        try:
            self._requests.remove(queued)
        except ValueError:
            return False
        return True

    def clear(self) -> None:
        self._requests.clear()
