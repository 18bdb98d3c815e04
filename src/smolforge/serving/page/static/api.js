// "Use via API": the same request in three languages, filled with the present settings.

import { copy, make } from "./dom.js";

const python = (value) => (value === null ? "None" : value === true ? "True" : value === false ? "False" : JSON.stringify(value));

const given = (values) => Object.fromEntries(Object.entries(values).filter(([, value]) => value !== undefined));

function snippets(model, needsKey, request) {
  const route = request.route, main = given(request.main), more = given(request.more);
  const call = route.replace("/", ".");
  const text = route === "completions" ? ["choices[0].text", "choices[0].text"] : ['choices[0].delta.content or ""', 'choices[0]?.delta?.content ?? ""'];
  const base = new URL("v1", document.baseURI.split("#")[0]).href;
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
stream = client.${call}.create(
    model=${python(model)},
${lines.join("\n")}
    stream=True,
)
for chunk in stream:
    print(chunk.${text[0]}, end="", flush=True)`,
    curl: `curl ${base}/${route} \\
${needsKey ? '  -H "Authorization: Bearer $SMOLFORGE_API_KEY" \\\n' : ""}  -H 'Content-Type: application/json' \\
  -d '${shell}'`,
    JavaScript: `import OpenAI from "openai";

const client = new OpenAI({ baseURL: "${base}", apiKey: ${needsKey ? "process.env.SMOLFORGE_API_KEY" : '"none"'} });
const stream = await client.${call}.create(${JSON.stringify({ model, ...main, ...more, stream: true }, null, 2)});
for await (const chunk of stream) process.stdout.write(chunk.${text[1]});`,
  };
}

// Fills the tab; `request` gives the route and the body that it shows.
export function api(place, state, request) {
  const code = make("code");
  const names = ["Python", "curl", "JavaScript"];
  let chosen = names[0];
  const copier = make("button", { type: "button", class: "tool", onclick: (click) => copy(code.textContent, click.currentTarget) }, "Copy");
  const buttons = names.map((name) => make("button", { type: "button", class: "tool", "aria-pressed": String(name === chosen),
    onclick: () => { chosen = name; buttons.forEach((b) => b.setAttribute("aria-pressed", String(b.textContent === name))); draw(); } }, name));
  place.replaceChildren(make("h2", {}, "Use via API"),
    make("p", {}, "The server speaks OpenAI's API. This is a request of the tab that you used last, with its present settings."),
    make("div", { class: "line" }, ...buttons, make("span", { class: "gap" }), copier),
    make("pre", { id: "snippet", class: "code", tabindex: "0" }, code),
    make("p", { class: "note" }, "Also here: /v1/chat/completions where the model has a chat template, /v1/models, /tokenize, /detokenize, /health, /metrics, /openapi.json."));
  function draw() {
    const text = snippets(state().model ?? "model", state().key, request())[chosen];
    if (code.textContent !== text) code.textContent = text;
  }
  return draw;
}
