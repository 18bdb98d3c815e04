// "Use via API": the same request in three languages, filled with the present settings.

import { copy, make } from "./dom.js";
import { forApi } from "./settings.js";
import * as live from "./settings.js";

const python = (value) => (value === null ? "None" : value === true ? "True" : value === false ? "False" : JSON.stringify(value));

function snippets(model, needsKey) {
  const { main, more } = forApi(live.current);
  const base = `${window.location.origin}/v1`;
  const body = JSON.stringify({ model, ...main, ...more }, null, 2);
  const key = needsKey ? 'os.environ["SMOLFORGE_API_KEY"]' : '"none"';
  const lines = Object.entries(main).map(([name, value]) => `    ${name}=${python(value)},`);
  if (Object.keys(more).length) {
    lines.push(`    extra_body={${Object.entries(more).map(([n, v]) => `${JSON.stringify(n)}: ${python(v)}`).join(", ")}},`);
  }
  const shell = body.replaceAll("'", "'\\''");
  return {
    Python: `${needsKey ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url="${base}", api_key=${key})
stream = client.completions.create(
    model=${python(model)},
${lines.join("\n")}
    stream=True,
)
for chunk in stream:
    print(chunk.choices[0].text, end="", flush=True)`,
    curl: `curl ${base}/completions \\
${needsKey ? '  -H "Authorization: Bearer $SMOLFORGE_API_KEY" \\\n' : ""}  -H 'Content-Type: application/json' \\
  -d '${shell}'`,
    JavaScript: `import OpenAI from "openai";

const client = new OpenAI({ baseURL: "${base}", apiKey: ${needsKey ? "process.env.SMOLFORGE_API_KEY" : '"none"'} });
const stream = await client.completions.create(${JSON.stringify({ model, ...main, ...more, stream: true }, null, 2)});
for await (const chunk of stream) process.stdout.write(chunk.choices[0].text);`,
  };
}

export function api(place, state) {
  const code = make("code");
  const names = ["Python", "curl", "JavaScript"];
  let chosen = names[0];
  const copier = make("button", { type: "button", class: "sf-tool", onclick: (click) => copy(code.textContent, click.currentTarget) }, "Copy");
  const buttons = names.map((name) => make("button", { type: "button", class: "sf-tool", "aria-pressed": String(name === chosen),
    onclick: () => { chosen = name; buttons.forEach((b) => b.setAttribute("aria-pressed", String(b.textContent === name))); draw(); } }, name));
  place.replaceChildren(make("section", { class: "sf-panel" },
    make("h2", { class: "sf-h2" }, "Use via API"),
    make("p", {}, "The server speaks OpenAI's API. This is the request that the first tab would make, with its present settings."),
    make("div", { class: "sf-line" }, ...buttons, make("span", { class: "sf-gap" }), copier),
    make("pre", { id: "sf-snippet", class: "sf-code", tabindex: "0" }, code),
    make("p", { class: "sf-note" }, "Also here: /v1/chat/completions where the model has a chat template, /v1/models, /tokenize, /detokenize, /health, /metrics, /openapi.json.")));
  function draw() {
    const text = snippets(state().model ?? "model", state().key)[chosen];
    if (code.textContent !== text) code.textContent = text;
  }
  return draw;
}
