"""Work for another thread keeps the settings of the thread that prepares it."""

from __future__ import annotations

import threading
from contextvars import ContextVar

from megatron_ee import platform

SETTING: ContextVar[str] = ContextVar("SETTING", default="default")


def in_thread(work: object) -> None:
    thread = threading.Thread(target=work)  # type: ignore[arg-type]
    thread.start()
    thread.join()


def test_settings_go_along() -> None:
    seen: list[str] = []

    def look() -> None:
        seen.append(SETTING.get())

    token = SETTING.set("chosen")
    prepared = platform.for_other_thread(look)
    in_thread(look)
    SETTING.reset(token)
    in_thread(prepared)
    assert seen == ["default", "chosen"]
