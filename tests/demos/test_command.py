"""`vislr demo`: its config, and who may do what by default."""

import dataclasses
import socket

import pytest
import yaml

from vislr.cli import main
from vislr.core.arguments import find_config, parse_config
from vislr.core.errors import LaunchError
from vislr.demos.app import DemoConfig, start


def test_the_config_that_comes_with_vislr_says_every_default():
    path = find_config("demo.yaml")
    config = parse_config(DemoConfig, ["--config", str(path)], prog="vislr demo", description="")
    assert config == DemoConfig()
    assert list(yaml.safe_load(path.read_text())) == [field.name for field in dataclasses.fields(DemoConfig)]


def test_only_this_machine_is_let_in_unless_asked():
    assert DemoConfig().host == "127.0.0.1"
    local = {host: DemoConfig(host=host).local for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "example.org")}
    assert local == {"127.0.0.1": True, "localhost": True, "::1": True, "0.0.0.0": False, "example.org": False}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--port", "99999"], "ConfigError: port is 99999; expected 0 to 65535"),
        (["--adapters", "nowhere"], "DataError: there is no folder 'nowhere'"),
        (["--hots", "0.0.0.0"], "did you mean 'host'"),
        (["--model", "emoji-unit"], "did you mean 'emoji-unet'"),
    ],
)
def test_wrong_words_are_one_line(argv, said, capsys):
    pytest.importorskip("gradio", reason="needs the extra 'demo'")
    assert main(["demo", *argv]) == 2
    error = capsys.readouterr().err
    assert said in error


def test_a_port_that_is_taken_is_said(files):
    pytest.importorskip("gradio", reason="needs the extra 'demo'")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(LaunchError, match="cannot be used"):
            start(DemoConfig(model=str(files["pipeline"]), port=other.getsockname()[1]))
