"""The router: HTTP in front of the shards."""

import os

# What this process forks becomes another program at once: gRPC, which reads this when it is imported, has nothing to
# prepare, nor to complain of.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
