"""The mark of tests whose kernels do not run on every machine."""

from __future__ import annotations

import pytest
from text_generation_server.cpu_kernels import compiler

REASON = compiler.reason_unavailable()
needs_kernels = pytest.mark.skipif(REASON is not None, reason=f"no kernels here: {REASON}")
