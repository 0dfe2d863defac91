"""What trying out one grammar may take; known on both sides of the process that does it."""

MAX_CPU_S = 2.0
"""Of a processor: how busy the machine is says nothing of a grammar."""
