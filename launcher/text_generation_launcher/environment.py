"""Flags from the environment: TGI's variables, the same with the prefix TGI_, and what children must not inherit."""

from __future__ import annotations

import enum
import ipaddress
from collections.abc import Mapping, MutableMapping

from text_generation_launcher.flags import FlagInfo, flag_table

PREFIX = "TGI_"

TRUE = frozenset({"true", "1", "yes", "y", "on"})
FALSE = frozenset({"false", "0", "no", "n", "off"})

WITHOUT_EFFECT = (
    "PREFILL_CHUNKING",
    "USE_FLASH_ATTENTION",
    "TGI_WIGGLE_ROOM",
    "DISABLE_EXLLAMA",
    "EXLLAMA_VERSION",
    "XPU_MEMORY_FRACTION",
    "MAX_IMAGE_FETCH_SIZE",
)
"""Switches of TGI that are no flags, for what is always on here or does not exist."""


PLATFORM_NAMES = {
    # SageMaker's, as TGI's image for it knew them.
    "HF_MODEL_ID": "MODEL_ID",
    "HF_MODEL_REVISION": "REVISION",
    "HF_MODEL_QUANTIZE": "QUANTIZE",
    "HF_MODEL_TRUST_REMOTE_CODE": "TRUST_REMOTE_CODE",
    "SM_NUM_GPUS": "NUM_SHARD",
}
"""What a platform calls a flag; the flag's own variable wins."""
PLATFORM_PORTS = ("AIP_HTTP_PORT", "SAGEMAKER_BIND_TO_PORT")
"""Where Vertex AI and SageMaker will ask, whatever PORT an image sets."""


def adopt(environ: MutableMapping[str, str]) -> list[str]:
    """Bring ``environ`` into the form that the command line reads; return warnings.

    ``TGI_X`` replaces ``X``, unless its value cannot be the flag's: Kubernetes injects ``TGI_PORT=tcp://...``
    beside a Service named tgi. Booleans become true and false, and commas in lists spaces.
    """
    warnings = []
    _adopt_platform(environ)
    for flag in flag_table():
        own = environ.get(PREFIX + flag.variable, "")
        if own and fits(flag, own):
            environ[flag.variable] = own
        elif own:
            warnings.append(f"Ignored {PREFIX}{flag.variable}={own!r}: not a value of {option_name(flag)}")
        value = environ.get(flag.variable, "").strip()
        if value:
            environ[flag.variable] = _normal(flag, value)
    # In a container HOSTNAME is the container's id, not a wish.
    if (hostname := environ.get("HOSTNAME", "")) and address(hostname) is None:
        warnings.append(invalid_hostname(hostname))
        del environ["HOSTNAME"]
    if ignored := [name for name in WITHOUT_EFFECT if environ.get(name)]:
        warnings.append(f"Without effect in this server: {', '.join(ignored)}")
    return warnings


def _adopt_platform(environ: MutableMapping[str, str]) -> None:
    for theirs, ours in PLATFORM_NAMES.items():
        value = environ.get(theirs, "").strip()
        if value and not environ.get(ours) and (theirs, value) != ("SM_NUM_GPUS", "0"):
            environ[ours] = value
    for name in PLATFORM_PORTS:
        if environ.get(name, "").strip():
            environ["PORT"] = environ[name].strip()


def without_flags(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without any flag: children are told by argv and by what `plan.py` sets, once."""
    mine = {flag.variable for flag in flag_table()}
    mine |= {PREFIX + variable for variable in mine}
    return {name: value for name, value in environ.items() if name not in mine}


def option_name(flag: FlagInfo) -> str:
    return "--" + flag.name.replace("_", "-")


def fits(flag: FlagInfo, value: str) -> bool:
    """Whether ``value`` is one that the flag can have."""
    if flag.kind is bool:
        return value.lower() in TRUE | FALSE
    if flag.name == "hostname":
        return address(value) is not None
    if issubclass(flag.kind, enum.Enum):
        return _normal(flag, value) in [member.value for member in flag.kind]
    if flag.kind not in (int, float):
        # A key may be any text: one that was ignored would leave the server open.
        return "://" not in value or flag.name in ("cors_allow_origin", "otlp_endpoint", "api_key")
    try:
        number = flag.kind(value)
    except ValueError:
        return False
    return (flag.minimum is None or number >= flag.minimum) and (flag.maximum is None or number <= flag.maximum)


def address(hostname: str) -> str | None:
    """The IP address that a ``--hostname`` means; None for any other name, such as a container's id."""
    # TGI would open a server that was asked to be local to the world.
    if hostname == "localhost":
        return "127.0.0.1"
    try:
        ipaddress.ip_address(hostname)
    except ValueError:
        return None
    return hostname


def invalid_hostname(hostname: str) -> str:
    """TGI's warning, and what it is about."""
    return f"Invalid hostname, defaulting to 0.0.0.0: {hostname!r} is no IP address"


def _normal(flag: FlagInfo, value: str) -> str:
    if flag.kind is list:
        return " ".join(value.replace(",", " ").split())
    if flag.kind is bool or flag.name == "sharded":
        word = value.lower()
        return "true" if word in TRUE else "false" if word in FALSE else value
    return value
