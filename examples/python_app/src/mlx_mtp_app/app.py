"""The window: a question, an answer that grows, and a button to stop it."""

import asyncio
from typing import Any

import toga
from toga.style import Pack
from toga.style.pack import COLUMN

import mlx_mtp

from .bridge import Bridge


class App(toga.App):
    def __init__(self, model: str) -> None:
        super().__init__("MLX-MTP App", "org.example.mlx_mtp_app")
        self.model = model
        self.bridge = Bridge(self.report)
        self.task: asyncio.Task[None] | None = None

    def startup(self) -> None:
        self.progress = toga.ProgressBar(max=1)
        self.question = toga.TextInput(value="Why is the sky blue?", on_confirm=self.ask)
        self.answer = toga.MultilineTextInput(readonly=True, style=Pack(flex=1))
        self.button = toga.Button("Ask", on_press=self.ask, enabled=False)
        parts = [self.progress, self.question, self.button, self.answer]
        self.main_window = toga.MainWindow(title=self.formal_name)
        self.main_window.content = toga.Box(children=parts, style=Pack(direction=COLUMN))
        self.main_window.show()

    async def on_running(self) -> None:
        await self.watch(self.bridge.load(self.model))
        self.button.enabled = True

    async def on_exit(self) -> bool:
        if self.task is not None:
            self.task.cancel()
        await self.bridge.close()
        return True

    def report(self, what: str, done: int, total: int) -> None:
        """Called by the bridge on the event loop, which is the user interface's."""
        self.progress.value = done / total

    async def ask(self, widget: Any, **_: Any) -> None:
        """The button asks, or stops what was asked."""
        if self.task is not None:
            self.task.cancel()
            return
        if not self.button.enabled:
            return
        self.answer.value, self.button.text = "", "Stop"
        self.task = asyncio.create_task(self.watch(self.show(self.question.value)))
        await asyncio.wait([self.task])
        self.task, self.button.text = None, "Ask"

    async def show(self, question: str) -> None:
        async for text in self.bridge.ask(question):
            self.answer.value += text

    async def watch(self, work: Any) -> None:
        try:
            await work
        except mlx_mtp.MTPError as error:
            self.answer.value = str(error)
