"""`doctor` says that the hub is online only when it has answered."""

import http.server
import threading

import pytest

from dcgen_convert.cli import doctor


class Answer(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_HEAD(self):
        self.send_response(self.status)
        self.end_headers()

    def log_message(self, *_):
        return


@pytest.mark.parametrize("status", [200, 403])
def test_a_server_that_answers(status):
    handler = type("Handler", (Answer,), {"status": status})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert doctor._unreachable(f"http://127.0.0.1:{server.server_port}") is None


def test_nobody_answers(monkeypatch):
    from huggingface_hub import constants

    with http.server.HTTPServer(("127.0.0.1", 0), Answer) as server:
        port = server.server_port
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    found = doctor._hub()
    assert found["state"] == "limited"
    assert found["reachable"] is False
    assert found["text"].startswith("not reachable (")


def test_offline_asks_nobody(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(doctor, "_unreachable", lambda _: pytest.fail("the hub was asked"))
    assert doctor._hub()["text"].startswith("offline (HF_HUB_OFFLINE)")
