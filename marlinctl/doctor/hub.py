"""Does the hub answer, as its own client asks it (proxy, certificates, HF_ENDPOINT)? And is there a token? Its value is never shown.

No answer is a warning: local models need no hub. The question is one anonymous request for one name, so a wrong token does not show here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from marlinctl.doctor.places import hub_home
from marlinctl.doctor.result import Check

SECONDS = 5
_YES = ("1", "ON", "YES", "TRUE")  # the spellings that huggingface_hub takes


def hub(*, offline: bool, quick: bool) -> Iterator[Check]:
    """offline: --offline was given. quick: send no request."""
    wish = "--offline" if offline else offline_by()
    if wish is not None:
        yield Check("hub", "ok", f"offline by {wish}: only what was downloaded before is used")
    elif not quick:
        yield _answer()


def token() -> Iterator[Check]:
    source = next((name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name, "").strip()), None)
    file = Path(os.path.expandvars(os.environ.get("HF_TOKEN_PATH") or str(hub_home() / "token"))).expanduser()
    if source is not None:
        yield Check("token", "ok", f"there is one, from {source}")
    elif not file.is_file():
        yield Check("token", "ok", "none: public models only; `hf auth login` stores one")
    elif not os.access(file, os.R_OK):
        yield Check("token", "warn", f"{file} cannot be read", "check its owner and permissions, or run hf auth login again")
    elif file.stat().st_mode & 0o044:
        yield Check("token", "warn", f"{file} can be read by other users of this machine", f"chmod 600 {file}")
    else:
        yield Check("token", "ok", f"there is one, from {file}")


def offline_by() -> str | None:
    """The variable that forbids the hub. HF_HUB_OFFLINE, if it says anything, wins over its older relative."""
    name = "HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE") else "TRANSFORMERS_OFFLINE"
    return f"{name}={os.environ[name]}" if os.environ.get(name, "").upper() in _YES else None


def _answer() -> Check:
    from huggingface_hub.constants import ENDPOINT
    from huggingface_hub.errors import HTTPError  # the base class of whichever HTTP client it uses
    from huggingface_hub.utils import get_session

    cure = "check the network, the proxy (HTTPS_PROXY) and HF_ENDPOINT; --offline works with local models and the cache"
    try:
        response = get_session().get(f"{ENDPOINT}/api/models?limit=1", timeout=SECONDS)
    except (HTTPError, OSError) as error:
        cause = (str(error).splitlines() or ["no more is known"])[0]
        return Check("hub", "warn", f"{ENDPOINT} cannot be reached: {type(error).__name__}: {cause}", cure)
    if response.status_code != 200:
        return Check("hub", "warn", f"{ENDPOINT} answers with HTTP {response.status_code}", cure)
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if not isinstance(answer, list):
        return Check("hub", "warn", f"{ENDPOINT} does not answer like a hub: a login page of the network, perhaps", cure)
    return Check("hub", "ok", f"{ENDPOINT} answers")
