"""What steps cost here, learned from those that ran, and how much of a prompt a step may carry by it.

A step that carries a chunk of a prompt takes longer than one of decode rows alone, and every running stream waits for
all of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

MARGIN = 0.9
"""Part of the time that is planned with: the next step may be slower than the last ones."""
STRETCH = 2.8
"""How many times as long as a step of the decode rows alone a step with a piece of a long prompt may take."""
LEAST_TOKENS = 4
"""Of a prompt in a step, however long that takes: it has to come to an end. A processor with slow products (AVX2) takes
the time of two decode steps for 8; attention looks at 4, 8 or 16 queries at once. Fewer than 16 come by so many."""
WHOLE_TOKENS = 16
"""More come by so many: products are computed 16 rows at a time where they are fast."""
UNKNOWN_TOKENS = 64
"""Of a prompt in a step as long as nothing is known."""

_MEMORY = 0.9
"""Weight of what was known, when something new is learned. The machine has other work, too, at some times."""
_SURPRISE = 4.0
"""No step counts for more than this many times what was expected: it was something else that took so long."""


@dataclass(frozen=True, slots=True)
class StepWork:
    """What a step computes."""

    num_decodes: int
    num_prompt_tokens: int
    context: float
    """Tokens before a prompt token, on average."""


@dataclass(slots=True)
class _Line:
    """Seconds of a prompt token by the tokens before it: a line through the recent past, by least squares."""

    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0

    def learn(self, x: float, y: float) -> None:
        self.weight, self.x, self.y = (
            _MEMORY * old + new for old, new in ((self.weight, 1.0), (self.x, x), (self.y, y))
        )
        self.xx, self.xy = _MEMORY * self.xx + x * x, _MEMORY * self.xy + x * y

    def at(self, x: float) -> float | None:
        if not self.weight:
            return None
        mean_x, mean_y = self.x / self.weight, self.y / self.weight
        spread = self.xx / self.weight - mean_x * mean_x
        # Points that lie together say nothing of a slope, and it is never negative.
        slope = 0.0 if spread < 1.0 + 1e-3 * mean_x * mean_x else (self.xy / self.weight - mean_x * mean_y) / spread
        slope = min(max(slope, 0.0), mean_y / mean_x if mean_x else 0.0)
        return mean_y + slope * (x - mean_x)


@dataclass(slots=True)
class StepCosts:
    """Kept current by `observe`."""

    _decode_s: dict[int, float] = field(default_factory=dict)
    """Seconds of a step of decode rows alone, by the binary digits of their number."""
    _token_s: _Line = field(default_factory=_Line)

    def observe(self, work: StepWork, seconds: float) -> None:
        """Learn from a step that took ``seconds`` on the shards."""
        if work.num_prompt_tokens == 0:
            size = work.num_decodes.bit_length()
            known = self._decode_s.get(size, seconds)
            self._decode_s[size] = known + (1 - _MEMORY) * (min(seconds, _SURPRISE * known) - known)
            return
        # Weights are read once a step, for decode rows or without them.
        token_s = max(seconds - (self.decode_s(max(work.num_decodes, 1)) or 0.0), 0.0) / work.num_prompt_tokens
        expected = self._token_s.at(work.context)
        self._token_s.learn(work.context, token_s if expected is None else min(token_s, _SURPRISE * expected))

    def decode_s(self, num_decodes: int) -> float | None:
        """Seconds of a step of so many decode rows; None as long as there was none."""
        size = num_decodes.bit_length()
        if not self._decode_s:
            return None
        nearest = min(self._decode_s, key=lambda known: abs(known - size))
        return self._decode_s[nearest]

    def step_s(self, work: StepWork) -> float:
        """Seconds of a whole step; nothing for what is not known."""
        token_s = self._token_s.at(work.context) or 0.0
        return (self.decode_s(max(work.num_decodes, 1)) or 0.0) + work.num_prompt_tokens * token_s

    def prompt_s(self, num_tokens: int, start: int) -> float:
        """Seconds that a chunk adds to a step; 0 as long as there was none."""
        return num_tokens * (self._token_s.at(start + num_tokens / 2) or 0.0)

    def tokens_within(self, seconds: float, start: int) -> int:
        """How many tokens of a prompt, from position ``start`` on, take so long."""
        if seconds == math.inf:
            return 2**31
        token_s = self._token_s.at(start)
        if token_s is None:
            return UNKNOWN_TOKENS
        tokens = int(seconds / max(token_s, 1e-9))
        if (later := self._token_s.at(start + tokens / 2)) and tokens:  # each costs a little more than the one before
            tokens = int(seconds / max(later, 1e-9))
        whole = WHOLE_TOKENS if tokens >= WHOLE_TOKENS else LEAST_TOKENS
        return tokens // whole * whole


class StepTime:
    """How much longer one step may get by the prompts in it; without decode rows nobody waits."""

    def __init__(
        self, costs: StepCosts, *, num_decodes: int, num_prompts: int, max_inter_token_latency_s: float | None
    ) -> None:
        """``num_prompts`` begun or waiting: when many wait for their first token, the running ones wait for them."""
        self._costs = costs
        self._bounds_all = max_inter_token_latency_s is not None
        self._left_s = math.inf
        self._may_be_more = True
        if not num_decodes:
            return
        decode_s = costs.decode_s(num_decodes)
        if decode_s is None:
            self._left_s = 0.0 if max_inter_token_latency_s is None else MARGIN * max_inter_token_latency_s
        elif max_inter_token_latency_s is not None:
            self._left_s = MARGIN * max_inter_token_latency_s - decode_s
        else:
            self._left_s = (MARGIN * STRETCH - 1) * decode_s * max(1.0, 2 * num_prompts / num_decodes)

    def tokens(self, wanted: int, start: int, *, is_long: bool) -> int:
        """How many of the ``wanted`` next tokens of a prompt the step takes in.

        Where no latency was asked for, only long prompts are cut: a short one is one pause, not many. One prompt of a
        step gets a few tokens, whatever time is left.
        """
        size = wanted
        if is_long or self._bounds_all:
            least = LEAST_TOKENS if self._may_be_more else 0
            size = min(wanted, max(self._costs.tokens_within(self._left_s, start), least))
            self._may_be_more = False
        self._left_s = max(self._left_s - self._costs.prompt_s(size, start), 0.0)
        return size
