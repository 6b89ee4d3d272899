"""What the Hub refuses, and a Hub that does not answer: one line each. The client is the real one."""

from __future__ import annotations

import errno
import time

import huggingface_hub
import pytest

from tests.hub_server import HubServer, Repo, point_client_at
from varcompress import InputError
from varcompress.loading import load
from varcompress.publish import push


def test_download_refusals(hub, elastic, tmp_path):
    with pytest.raises(InputError, match=r"cannot load ann/none: .* no such repository"):
        load("ann/none")
    push(elastic, "ann/tiny")
    with pytest.raises(InputError, match="no revision 'v9'"):
        load("ann/tiny", revision="v9")
    hub.repos["meta/gated"] = Repo(private=False, gated=True)
    hub.repos["meta/gated"].commit(hub.files("ann/tiny"))
    with pytest.raises(InputError, match="access is restricted"):
        load("meta/gated")
    hub.refuse("HEAD .*/resolve/", 403)
    with pytest.raises(InputError, match="your token does not allow it"):
        load("ann/tiny")


def test_without_a_connection(hub, elastic, monkeypatch):
    push(elastic, "ann/tiny")
    load("ann/tiny", device="cpu")
    with HubServer() as gone:
        pass
    point_client_at(gone.endpoint, monkeypatch)
    load("ann/tiny", device="cpu")  # from the cache
    started = time.monotonic()
    with pytest.raises(InputError, match="cannot be reached: check the connection"):
        load("ann/other")
    assert time.monotonic() - started < 15  # the client's own retries take longer
    with pytest.raises(InputError, match="cannot be reached: check the connection"):
        push(elastic, "ann/tiny")


def test_a_full_disk_while_downloading(hub, elastic, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    push(elastic, "ann/tiny")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(InputError, match="no room left on the disk"):
        load("ann/tiny")
