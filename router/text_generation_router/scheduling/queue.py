"""Requests that wait for their first step, whose turn it is, and the rule that may hold them back."""

from __future__ import annotations

import bisect
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from text_generation_router.scheduling.requests import QueuedRequest
from text_generation_router.scheduling.shares import Shares

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
    """Whose turn it is: suspects alone and first; then of the least served tenant the request of highest priority, of
    equals the one that came first.

    A request that comes back, pre-empted or from shards that failed, takes the place that its arrival gives it.
    """

    def __init__(self, *, fair_shares: bool = True) -> None:
        """``fair_shares``: else all requests are one tenant's."""
        self.shares = Shares()
        self._fair = fair_shares
        self._lists: dict[Hashable, list[tuple[int, int, QueuedRequest]]] = {}
        """Of each tenant that has any, in order: minus priority, number of arrival."""
        self._suspects: list[tuple[int, int, QueuedRequest]] = []
        self._arrivals: dict[QueuedRequest, int] = {}
        """Number of arrival of all that wait or run."""
        self._num_arrived = 0
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __iter__(self) -> Iterator[QueuedRequest]:
        return (queued for entries in (self._suspects, *self._lists.values()) for _, _, queued in entries)

    def tenant_of(self, queued: QueuedRequest) -> Hashable:
        return queued.request.tenant if self._fair else None

    def append(self, queued: QueuedRequest) -> None:
        """A request comes."""
        self._num_arrived += 1
        self._arrivals[queued] = self._num_arrived
        self.shares.enter(self.tenant_of(queued))
        self._insert(queued)

    def put_back(self, queued: QueuedRequest) -> None:
        """One that was popped waits again."""
        self._insert(queued)

    def leave(self, queued: QueuedRequest) -> None:
        """A request has ended that was popped. Harmless for one that is not known any more."""
        if self._arrivals.pop(queued, None) is not None:
            self.shares.leave(self.tenant_of(queued))

    def first(self) -> QueuedRequest | None:
        """The next request, left in the queue."""
        if self._suspects:
            return self._suspects[0][2]
        if not self._lists:
            return None
        return self._lists[self.shares.next_of(self._lists)][0][2]

    def pop(self) -> QueuedRequest:
        """The same, taken out of it; it stays known until it is put back or leaves."""
        queued = self.first()
        if queued is None:
            raise IndexError("nothing waits")
        self._take_out(queued)
        return queued

    def remove(self, queued: QueuedRequest) -> bool:
        """Forget a request that waits; False when it does not wait."""
        if queued not in self._arrivals or not self._take_out(queued):
            return False
        self.leave(queued)
        return True

    def clear(self) -> None:
        """Forget all that wait."""
        for queued in list(self):
            self.remove(queued)

    def _key(self, queued: QueuedRequest) -> tuple[int, int]:
        return -queued.request.priority, self._arrivals[queued]

    def _insert(self, queued: QueuedRequest) -> None:
        entries = self._suspects if queued.is_suspect else self._lists.setdefault(self.tenant_of(queued), [])
        bisect.insort(entries, (*self._key(queued), queued), key=_order)
        self._num_waiting += 1

    def _take_out(self, queued: QueuedRequest) -> bool:
        tenant = self.tenant_of(queued)
        for entries in (self._suspects, self._lists.get(tenant, [])):
            place = bisect.bisect_left(entries, self._key(queued), key=_order)
            if place < len(entries) and entries[place][2] is queued:
                del entries[place]
                self._num_waiting -= 1
                if tenant in self._lists and not self._lists[tenant]:
                    del self._lists[tenant]
                return True
        return False


def _order(entry: tuple[int, int, QueuedRequest]) -> tuple[int, int]:
    return entry[:2]
