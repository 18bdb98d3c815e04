// Small helpers: elements without string templates, so that no text of a model or a file is ever read as HTML.

export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") Object.entries(value).forEach(([property, text]) => element.style.setProperty(property, text));
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

export const number = (value, digits = 0) =>
  Number(value).toLocaleString("en-US", { maximumFractionDigits: digits, minimumFractionDigits: digits });

// Copies text, also where the page is not served securely and the clipboard API does not exist.
export async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = make("textarea", { style: { position: "fixed", opacity: "0" } });
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const before = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = before), 1200);
}

// Puts Stop in the place of the button that begins something, while that runs; the focus stays on the place.
export function swap(begin, stop, busy) {
  const focused = [begin, stop].includes(document.activeElement);
  begin.hidden = busy;
  stop.hidden = !busy;
  if (focused) (busy ? stop : begin).focus();
}

// A request that no answer came to: the browser's own words ("Failed to fetch") say nothing of the server.
const lost = (error) => {
  throw error.name === "AbortError" ? error : new Error("The server does not answer. Is it still running?");
};

// The answer to a POST. Throws an Error with the server's own words.
export async function post(path, body, signal) {
  const answer = await fetch(path, {
    method: "POST", signal, body: JSON.stringify(body),
    // Behind a proxy the server may not know its own name; this header tells that no other web page asks.
    headers: { "Content-Type": "application/json", "X-Requested-With": "smolforge" },
  }).catch(lost);
  if (answer.ok) return answer;
  if (answer.status === 401) window.location = "login";
  let message = `the server answered ${answer.status}`;
  try { message = (await answer.json()).error.message; } catch { /* not JSON: the status has to do */ }
  throw new Error(message);
}

// Reads server-sent events of a POST and hands each one on. Throws an Error with the server's own words.
export async function events(path, body, signal, take) {
  const answer = await post(path, body, signal);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read().catch(lost);
    if (done) return;
    text += value;
    for (let end = text.indexOf("\n\n"); end >= 0; end = text.indexOf("\n\n")) {
      const line = text.slice(0, end);
      text = text.slice(end + 2);
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const news = JSON.parse(line.slice(6));
      if (news.error) throw new Error(news.error.message);
      take(news);
    }
  }
}
