import pytest


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    """No model of the hub counts as downloaded."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
