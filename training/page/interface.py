"""The page as a whole, in gradio. Every text of a model or a user goes into a text box, which shows it as text."""

from __future__ import annotations

import hmac
import os
from collections.abc import Callable, Mapping

import gradio as gr
from starlette.middleware import Middleware

from training.model.generation import PARAMETERS
from training.model.loading import max_positions
from training.page.guard import OwnRequestsOnly
from training.page.state import Page

STYLE = """
.gradio-container { width: 100%; max-width: 1100px !important; margin: 0 auto !important; }
:focus-visible { outline: 3px solid #1d4ed8 !important; outline-offset: 2px; }
"""
# Fonts that the system has. gradio's own would be one more download.
THEME = gr.themes.Default(
    primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
).set(button_primary_background_fill="*primary_600", button_primary_background_fill_hover="*primary_700")


def build(page: Page, tabs: Mapping[str, Callable[[Page, list[gr.Number]], None]]) -> gr.Blocks:
    """The page with its tabs. Nothing is generated before a button is pressed."""

    def close(request: gr.Request) -> None:  # the tab was closed
        page.stop(str(request.session_hash))

    with gr.Blocks(title="Dolly", analytics_enabled=False) as blocks:
        gr.Markdown(
            "# Dolly\nAsk the models and continue the conversation, or compare two answers without knowing whose they "
            "are."
        )
        with gr.Accordion("How the models answer", open=False):
            gr.Markdown(
                "With a temperature of 0 a model takes the most likely token each time. A top_k of 0 is no limit."
            )
            with gr.Row():
                # A prompt needs room, too.
                most = min(max_positions(model.model.config) for model in page.models) // 2
                sampling = [
                    gr.Number(
                        value=min(default, most) if name == "max_new_tokens" else default,
                        label=name,
                        min_width=120,
                        step=1 if kind == "long" else 0.05,
                    )
                    for name, kind, default in PARAMETERS
                ]
        for name, tab in tabs.items():
            with gr.Tab(name):
                tab(page, sampling)
        blocks.unload(close)
    return blocks.queue(api_open=False, max_size=64)


def launch(blocks: gr.Blocks, host: str, port: int, password: str | None) -> gr.Blocks:
    """Serves the page, without links to share it, without recording and without any request to another machine.

    Any user name goes with the password. Requests of other web sites are refused. Raises OSError if the port cannot be used.
    """

    def is_right(_user: str, typed: str) -> bool:
        return hmac.compare_digest(typed.encode(errors="replace"), str(password).encode(errors="replace"))

    # gradio asks its own server whether it runs, and a proxy of the network cannot reach this machine.
    names = [host, "127.0.0.1", "localhost", "0.0.0.0"]
    for variable in ("NO_PROXY", "no_proxy"):
        os.environ[variable] = ",".join([*filter(None, [os.environ.get(variable)]), *names])
    blocks.launch(
        prevent_thread_lock=True,
        server_name=host,
        server_port=port,
        auth=is_right if password else None,
        auth_message="Type any user name, and the password of this page." if password else None,
        share=False,
        quiet=True,
        show_error=False,
        footer_links=[],
        run_history=False,
        max_file_size=1,  # bytes; the page takes no files, but gradio would store them
        enable_monitoring=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        app_kwargs={"middleware": [Middleware(OwnRequestsOnly, any_name=bool(password))]},
        theme=THEME,
        css=STYLE,
    )
    return blocks
