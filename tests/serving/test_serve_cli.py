"""`if-jax serve`: what it refuses before anything is loaded."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from if_jax.cli import main


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--host", "0.0.0.0"), "--host 0.0.0.0 is open to other machines: give --auth FILE"),
        (("--auth", "missing"), "--auth missing: no such file"),
        (("--warm", "1:99"), "--warm: aspect_ratio is '1:99'"),
        (("--cascade", "nowhere", "--port", "0"), "nowhere"),
        (("--port", "0", "--watermark", "none.png"), "none.png: no such file"),
        (("--port", "0", "--lora", "style:much"), "'much' is no weight"),
        (("--host", "127.0.0.999", "--auth", "tokens"), "--host 127.0.0.999 --port 7860"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tokens").write_text("anna 0123456789abcdef\n")
    result = CliRunner().invoke(main, ["serve", *words])
    assert result.exit_code == 1 and message in result.output, result.output
    assert len(result.output.strip().splitlines()) == 1


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        result = CliRunner().invoke(main, ["serve", "--port", str(port)])
    assert result.exit_code == 1 and f"--port {port}: Address already in use; choose another" in result.output
