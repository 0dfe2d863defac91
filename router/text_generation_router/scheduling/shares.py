"""Fair shares: who has been served how much, in tokens.

The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): the tenant with the
smallest counter is next, and one that comes back from idleness is lifted to those that stayed, so that nobody saves up.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable

from text_generation_router.scheduling.requests import QueuedRequest

INPUT_WEIGHT = 1.0
OUTPUT_WEIGHT = 2.0
"""A generated token takes part in a step of its own; prompts are computed many tokens at a time."""
MAX_REMEMBERED = 10_000
"""Tenants, idle ones among them: where no key is asked for, clients make up names as they like."""


class Shares:
    """Counters of all tenants. A tenant is active while it has requests that wait or run."""

    def __init__(self) -> None:
        self._served: dict[Hashable, float] = {}
        self._active: dict[Hashable, int] = {}
        self._floor = 0.0
        """What the least served of the active ones had when it was looked at last; never falls."""

    @property
    def num_active(self) -> int:
        return len(self._active)

    def served(self, tenant: Hashable) -> float:
        return self._served.get(tenant, self._floor)

    def enter(self, tenant: Hashable) -> None:
        """One more request of the tenant waits or runs."""
        self._look()
        if tenant not in self._active:
            self._served[tenant] = max(self._served.get(tenant, 0.0), self._floor)
        self._active[tenant] = self._active.get(tenant, 0) + 1

    def leave(self, tenant: Hashable) -> None:
        """One of its requests has ended. Raises: KeyError for one that never came."""
        self._look()
        self._active[tenant] -= 1
        if not self._active[tenant]:
            del self._active[tenant]
            if len(self._served) > MAX_REMEMBERED:
                self._forget()

    def charge(self, tenant: Hashable, *, input_tokens: int = 0, output_tokens: int = 0) -> None:
        """Count tokens that were computed for a tenant that is active."""
        self._served[tenant] += INPUT_WEIGHT * input_tokens + OUTPUT_WEIGHT * output_tokens

    def cost(self, queued: QueuedRequest) -> float:
        """What a request is charged at most."""
        return INPUT_WEIGHT * queued.num_prompt_tokens + OUTPUT_WEIGHT * queued.request.max_new_tokens

    def next_of(self, tenants: Iterable[Hashable]) -> Hashable:
        """The least served of some active tenants; of equals the first."""
        return min(tenants, key=self._served.__getitem__)

    def _look(self) -> None:
        if self._active:
            self._floor = max(self._floor, min(self._served[tenant] for tenant in self._active))

    def _forget(self) -> None:
        """Those who are idle: when they come back they are at least at the floor again."""
        self._served = {tenant: self._served[tenant] for tenant in self._active}
