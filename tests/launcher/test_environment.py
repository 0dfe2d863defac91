from __future__ import annotations

from text_generation_launcher.environment import adopt, without_flags


def test_children_inherit_no_flag_in_either_form() -> None:
    environ = {"PORT": "80", "TGI_PORT": "81", "API_KEY": "secret", "TGI_API_KEY": "secret", "HOSTNAME": "pod-1"}
    assert without_flags(environ | {"PATH": "/bin", "TGI_PORT_80_TCP": "tcp://x"}) == {
        "PATH": "/bin",
        "TGI_PORT_80_TCP": "tcp://x",
    }


def test_switches_that_do_nothing_are_named() -> None:
    assert adopt({"USE_FLASH_ATTENTION": "false", "PREFILL_CHUNKING": "1", "EXLLAMA_VERSION": ""}) == [
        "Without effect in this server: PREFILL_CHUNKING, USE_FLASH_ATTENTION"
    ]
