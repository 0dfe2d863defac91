from __future__ import annotations

from text_generation_launcher.environment import without_flags


def test_children_inherit_no_flag_in_either_form() -> None:
    environ = {"PORT": "80", "TGI_PORT": "81", "API_KEY": "secret", "TGI_API_KEY": "secret", "HOSTNAME": "pod-1"}
    assert without_flags(environ | {"PATH": "/bin", "TGI_PORT_80_TCP": "tcp://x"}) == {
        "PATH": "/bin",
        "TGI_PORT_80_TCP": "tcp://x",
    }
