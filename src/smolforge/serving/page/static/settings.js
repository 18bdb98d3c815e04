// The settings of the page: what the controls say, what a link carries, what the API would be sent.

export const DEFAULTS = {
  prompt: "", max_tokens: 100, temperature: 0.8, top_p: 0.9, top_k: 0, min_p: 0, repetition_penalty: 1, seed: null,
  keep: false,
};
const NAMES = Object.keys(DEFAULTS); // in the order of the page's controls
const LIMITS = {
  max_tokens: [1, 1024], temperature: [0.1, 2], top_p: [0.1, 1], top_k: [0, 200], min_p: [0, 0.5],
  repetition_penalty: [1, 2], seed: [0, Number.MAX_SAFE_INTEGER],
};

export let current = { ...DEFAULTS };

// Controls in order of NAMES; an emptied number box is its default.
export function fromKnobs(values) {
  const found = {};
  NAMES.forEach((name, i) => {
    const value = values[i];
    if (name === "prompt") found.prompt = value ?? "";
    else if (name === "keep") found.keep = Boolean(value);
    else {
      const wanted = value === null || value === undefined || value === "" || !Number.isFinite(Number(value));
      found[name] = wanted ? DEFAULTS[name] : clamp(name, Number(value));
    }
  });
  current = found;
  return found;
}

function clamp(name, value) {
  const [low, high] = LIMITS[name];
  const whole = ["max_tokens", "top_k", "seed"].includes(name) ? Math.round(value) : value;
  return Math.min(high, Math.max(low, whole));
}

// Stays behind the #, which browsers never send: prompts do not end up in a server's log.
export function toLink(settings) {
  const parameters = new URLSearchParams();
  for (const name of NAMES) {
    const value = settings[name];
    if (value !== DEFAULTS[name] && value !== null) parameters.set(name, String(value));
  }
  const hash = parameters.toString();
  return window.location.origin + window.location.pathname + (hash ? `#${hash}` : "");
}

// Values for the controls, in their order.
export function fromLink(hash) {
  const parameters = new URLSearchParams(hash.replace(/^#/, ""));
  const found = NAMES.map((name) => {
    if (!parameters.has(name)) return DEFAULTS[name];
    const text = parameters.get(name);
    if (name === "prompt") return text;
    if (name === "keep") return text === "true";
    return text !== "" && Number.isFinite(Number(text)) ? clamp(name, Number(text)) : DEFAULTS[name];
  });
  fromKnobs(found);
  return found;
}

// What the API is sent: only what differs from its own defaults.
export function forApi(settings) {
  const { prompt, max_tokens, temperature, top_p, top_k, min_p, repetition_penalty, seed } = settings;
  const more = {};
  if (top_k) more.top_k = top_k;
  if (min_p) more.min_p = min_p;
  if (repetition_penalty !== 1) more.repetition_penalty = repetition_penalty;
  return { main: { prompt, max_tokens, temperature, top_p, ...(seed === null ? {} : { seed }) }, more };
}

export const forPage = ({ keep, ...settings }) => settings;
export const drawSeed = () => crypto.getRandomValues(new Uint32Array(1))[0];
