"""``/``: a chat that shows which layer wrote each token. Its files are part of the package; nothing else is loaded."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from starlette.responses import FileResponse
from starlette.staticfiles import StaticFiles

DIRECTORY = Path(__file__).resolve().parents[1] / "page"
router = APIRouter()


@router.get("/", summary="The web page", response_class=FileResponse)
async def page() -> FileResponse:
    """A chat whose tokens are tinted by the layer that wrote them."""
    return FileResponse(DIRECTORY / "index.html", media_type="text/html; charset=utf-8")


def page_files() -> StaticFiles:
    """The scripts and styles of the page, for ``/page``."""
    return StaticFiles(directory=DIRECTORY)
