"""The page: the seed project's Gradio app and beyond.

Gradio lays out the controls. What moves is drawn by our own script (`static/`), which talks to the routes beside
this file: tokens appear the moment they are made, and stopping is closing the connection. Nothing is fetched
from elsewhere, and nothing is reported.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from smolforge.config import THREE_PROMPTS
from smolforge.serving.page.write import MAX_TOKENS, write_for_gradio
from smolforge.serving.state import Service

if TYPE_CHECKING:
    from fastapi import FastAPI

_HEAD = """<meta name="description" content="A small language model, served by smolforge.">
<link rel="icon" href="/page/static/icon.svg" type="image/svg+xml">
<link rel="stylesheet" href="/page/static/page.css">
<script type="module" src="/page/static/main.js"></script>"""
# A part of the page that the script fills; it may be rendered before the script has come, or again later.
_FILL = "(window.smolforgeParts = window.smolforgeParts || []).push([{name!r}, element]);"

# The controls ask for the values of a link as the page loads, perhaps before the script has come.
_FROM_LINK = """async () => {
  while (!window.smolforge) await new Promise((next) => setTimeout(next, 20));
  return window.smolforge.fromLink();
}"""


def mount(app: FastAPI, service: Service) -> None:
    """Put the page at / of the app. Must come after all other routes."""
    # Gradio reads these when it is imported.
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import gradio as gr

    blocks = _blocks(gr, service)
    gr.mount_gradio_app(
        app, blocks, path="/", theme=_theme(gr), head=_HEAD, footer_links=[], run_history=False, ssr_mode=False,
        pwa=False, mcp_server=False, enable_monitoring=False, show_error=True, max_file_size=1,
    )  # fmt: skip


def _theme(gr: Any) -> Any:
    """Warm paper and embers; fonts that every system has, since Gradio's own come from Google."""
    sans = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace"]
    return gr.themes.Base(
        primary_hue="orange", secondary_hue="orange", neutral_hue="stone", radius_size="md", font=sans, font_mono=mono
    ).set(
        body_background_fill="#faf7f2", body_background_fill_dark="#171412",
        block_background_fill="#ffffff", block_background_fill_dark="#211d1a",
        block_border_width="1px", block_border_color="#e7e0d6", block_border_color_dark="#37302b",
        block_label_background_fill="transparent", block_label_background_fill_dark="transparent",
        input_background_fill="#ffffff", input_background_fill_dark="#1b1815",
        button_primary_background_fill="#b83a06", button_primary_background_fill_hover="#9a3005",
        button_primary_background_fill_dark="#c2410c", button_primary_background_fill_hover_dark="#d9520f",
        button_primary_text_color="#ffffff", button_primary_text_color_dark="#ffffff",
        button_secondary_background_fill="#f1ebe2", button_secondary_background_fill_dark="#2e2824",
        slider_color="#c2410c", slider_color_dark="#ea6a1f",
        input_border_width="1px", input_border_color="#e7e0d6", input_border_color_dark="#443b35",
        block_info_text_color="#6f645b", block_info_text_color_dark="#a89b8f",
        color_accent="#c2410c", button_border_width="0px",
    )  # fmt: skip


def _blocks(gr: Any, service: Service) -> Any:
    """Layout and events. Every event is a line of script; Python is not asked."""

    def part(name: str) -> Any:
        return gr.HTML(
            f'<div class="sf-part" id="sf-{name}"></div>', js_on_load=_FILL.format(name=name), apply_default_css=False
        )

    source = service.source
    with gr.Blocks(title=f"{source.name} · smolforge", analytics_enabled=False, fill_width=False) as blocks:
        part("header")
        with gr.Tabs():
            with gr.Tab("Write", id="write"), gr.Row(elem_id="sf-desk", equal_height=False):
                with gr.Column(scale=5, min_width=300, elem_id="sf-controls"):
                    prompt = gr.Textbox(
                        label="Prompt", lines=3, max_lines=12, elem_id="sf-prompt", max_length=100_000,
                        placeholder="Begin a text. Leave it empty to let the model begin by itself.",
                    )  # fmt: skip
                    with gr.Row(elem_id="sf-examples"):
                        examples = [gr.Button(text, size="sm", elem_classes="sf-example") for text in THREE_PROMPTS]
                    with gr.Row(elem_id="sf-buttons"):
                        submit = gr.Button("Submit", variant="primary", elem_id="sf-submit", min_width=90)
                        stop = gr.Button("Stop", variant="stop", elem_id="sf-stop", min_width=70, interactive=True)
                        clear = gr.Button("Clear", elem_id="sf-clear", min_width=70)
                    tokens = gr.Slider(1, MAX_TOKENS, 100, step=1, label="Maximum tokens", elem_id="sf-tokens")
                    temperature = gr.Slider(
                        0.1, 2.0, 0.8, step=0.05, label="Temperature", elem_id="sf-temperature",
                        info="Low is careful, high is daring.",
                    )  # fmt: skip
                    top_p = gr.Slider(
                        0.1, 1.0, 0.9, step=0.05, label="Top-p", elem_id="sf-top-p",
                        info="Only the likeliest tokens with this much probability together.",
                    )  # fmt: skip
                    with gr.Row(elem_id="sf-seeds"):
                        seed = gr.Number(
                            value=None, label="Seed", precision=0, minimum=0, elem_id="sf-seed", min_width=130,
                            placeholder="drawn when you submit",
                        )  # fmt: skip
                        keep = gr.Checkbox(False, label="Keep the seed", elem_id="sf-keep", min_width=120)
                    with gr.Accordion("More settings", open=False, elem_id="sf-more"):
                        top_k = gr.Slider(0, 200, 0, step=1, label="Top-k (0 is off)", elem_id="sf-top-k")
                        min_p = gr.Slider(0.0, 0.5, 0.0, step=0.01, label="Min-p (0 is off)", elem_id="sf-min-p")
                        penalty = gr.Slider(
                            1.0, 2.0, 1.0, step=0.05, label="Repetition penalty (1 is off)", elem_id="sf-penalty"
                        )
                with gr.Column(scale=7, min_width=300, elem_id="sf-paper-column"):
                    part("paper")
            with gr.Tab("Time-timelapse", id="timelapse"):
                part("timelapse")
            with gr.Tab("Training", id="training"):
                part("training")
            with gr.Tab("API", id="api"):
                part("api")
        knobs = [prompt, tokens, temperature, top_p, top_k, min_p, penalty, seed, keep]
        _wire(gr, blocks, knobs, submit, stop, clear, examples)

        async def generate(prompt: str, max_tokens: int = 100, temperature: float = 0.8, top_p: float = 0.9) -> Any:
            """The prompt with its continuation, as it grows."""
            async for text in write_for_gradio(service, prompt, max_tokens, temperature, top_p):
                yield text

        gr.api(generate, api_name="generate", concurrency_limit=None)
    return blocks


def _wire(gr: Any, blocks: Any, knobs: list[Any], submit: Any, stop: Any, clear: Any, examples: list[Any]) -> None:
    prompt, seed = knobs[0], knobs[7]
    run: dict[str, Any] = {"fn": None}
    submit.click(**run, inputs=knobs, outputs=[seed], js="(...k) => window.smolforge.submit(k)")
    prompt.submit(**run, inputs=knobs, outputs=[seed], js="(...k) => window.smolforge.submit(k)")
    stop.click(**run, js="() => window.smolforge.stop()")
    clear.click(**run, outputs=[prompt], js="() => window.smolforge.clear()")
    for button, text in zip(examples, THREE_PROMPTS, strict=True):
        button.click(**run, outputs=[prompt], js=f"() => window.smolforge.example({text!r})")
    gr.on([knob.change for knob in knobs], **run, inputs=knobs, js="(...k) => window.smolforge.knobs(k)")
    blocks.load(**run, outputs=knobs, js=_FROM_LINK)
