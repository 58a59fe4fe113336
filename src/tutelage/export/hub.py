"""An export on the hub, by name."""

from __future__ import annotations

from pathlib import Path

from tutelage.export.errors import ExportError
from tutelage.export.run import CARD, RECORD
from tutelage.untrusted import read_object


class UploadError(RuntimeError):
    """The hub refused, or could not be reached."""


def uploads(folder: Path) -> dict[str, int]:
    """What `push` would upload: files of the export and their bytes; whatever else lies in the folder stays."""
    entries = read_object(folder / RECORD)["formats"].values()
    names = {CARD, RECORD, *(file for entry in entries for file in entry["files"])}
    return {name: (folder / name).stat().st_size for name in sorted(names)}


def check_name(name: str) -> str:
    """Raises:
    ExportError: the hub has no such names.
    """
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ExportError(
            f"{name!r} is no name on the hub: {error}; write for example me/my-student"
        ) from None
    return name


def push(folder: Path, name: str) -> str:
    """Upload an export in one commit, into a repository that is made where it does not exist; gives its address.

    The token is the hub client's own: HF_TOKEN, or that of ``hf auth login``. It is never shown.

    Raises:
        UploadError: no token, no network, or the hub refuses.
    """
    import huggingface_hub as hub

    api = hub.HfApi()
    token = hub.get_token()
    if token is None:
        raise UploadError("there is no token for the hub: set HF_TOKEN, or log in with: hf auth login")
    try:
        address = api.create_repo(name, exist_ok=True)
        api.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=list(uploads(folder)),
            commit_message="Student exported by tutelage",
        )
    except hub.errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "?"
        said = (error.server_message or "").replace(token, "…")[:300]
        raise UploadError(
            f"{api.endpoint} refused {name} ({status}{_meaning(status)}) {said}".rstrip()
        ) from None
    except Exception as error:  # each HTTP library that the client has used has had classes of its own
        reason = str(error).replace(token, "…").splitlines()[:1] or [type(error).__name__]
        raise UploadError(f"{api.endpoint} cannot be reached: {reason[0]}") from None
    return str(address)


def _meaning(status: int | str) -> str:
    meanings = {
        401: ": the token is not valid",
        403: ": the token may not write there",
        404: ": no such place, or the token may not see it",
        409: ": somebody else changed it meanwhile; try again",
    }
    return meanings.get(status, "") if isinstance(status, int) else ""
