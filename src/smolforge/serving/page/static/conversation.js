// A conversation as a tree of turns: an edited question and a retried answer are new turns next to the old ones, so
// nothing is lost. `last` is the end of the branch that is shown.
//
// A turn is { parent, role, content } and, of an answer, { finish, problem, tokens, rate, used, context, step }. Its number
// is its place in `turns`; the parent of a first question is -1.

const isText = (value) => typeof value === "string";
const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const TITLE_LENGTH = 60;

export class Conversation {
  constructor(data = {}) {
    this.id = data.id ?? crypto.getRandomValues(new Uint32Array(2)).join("-");
    this.title = data.title ?? "";
    this.changed = data.changed ?? Date.now();
    this.settings = { system: "", seed: null, sampling: {}, ...data.settings };
    this.turns = data.turns ?? [];
    this.last = data.last ?? -1;
  }

  // Reads what `toText` wrote. An answer that was being written when the page was closed counts as stopped.
  static fromText(text) {
    const data = JSON.parse(text);
    const whole = isObject(data) && isText(data.id) && isText(data.title) && Number.isFinite(data.changed) && isObject(data.settings)
      && isText(data.settings.system) && isObject(data.settings.sampling) && Array.isArray(data.turns)
      && data.turns.every((turn, i) => isObject(turn) && isText(turn.content) && ["user", "assistant"].includes(turn.role)
        && Number.isInteger(turn.parent) && turn.parent >= -1 && turn.parent < i)
      && Number.isInteger(data.last) && data.last >= -1 && data.last < data.turns.length;
    if (!whole) throw new Error("this is not a conversation");
    for (const turn of data.turns) if (turn.role === "assistant" && !turn.finish && !turn.problem) turn.finish = "stopped";
    return new Conversation(data);
  }

  toText() {
    const { id, title, changed, settings, turns, last } = this;
    return JSON.stringify({ id, title, changed, settings, turns, last });
  }

  get name() { return this.title || "New conversation"; }

  // Adds a turn and shows its branch.
  add(turn) {
    if (!this.title && turn.role === "user") this.title = shortened(turn.content);
    this.turns.push(turn);
    this.last = this.turns.length - 1;
    this.changed = Date.now();
    return this.last;
  }

  // The turns from the first one to `end`, which is the last one shown unless given.
  path(end = this.last) {
    const found = [];
    for (let at = end; at >= 0; at = this.turns[at].parent) found.unshift(at);
    return found;
  }

  // The turns that stand at the same place as `at`, itself among them, oldest first.
  versions(at) {
    const { parent, role } = this.turns[at];
    return [...this.turns.keys()].filter((i) => this.turns[i].parent === parent && this.turns[i].role === role);
  }

  // Shows another version of a turn, with the newest turns after it.
  choose(at) {
    this.last = at;
    for (let next = at; next >= 0; next = this.turns.findLastIndex((turn) => turn.parent === this.last)) this.last = next;
  }

  // The messages up to the turn `end`, as the API takes them.
  messages(end = this.last) {
    const turns = this.path(end).map((at) => this.turns[at]).map(({ role, content }) => ({ role, content }));
    return this.settings.system ? [{ role: "system", content: this.settings.system }, ...turns] : turns;
  }

  toMarkdown() {
    const words = { system: "System", user: "You", assistant: "Model" };
    const parts = this.messages().map(({ role, content }) => `## ${words[role]}\n\n${content}\n`);
    return [`# ${this.name}\n`, ...parts].join("\n");
  }

  // The branch that is shown, as one line of chat data would have it, and the settings.
  toExport(model) {
    const { title, settings: { system, ...settings } } = this;
    return JSON.stringify({ title, model, settings, messages: this.messages() }, null, 2) + "\n";
  }
}

function shortened(text) {
  const line = text.trim().replace(/\s+/g, " ");
  return line.length > TITLE_LENGTH ? `${line.slice(0, TITLE_LENGTH - 1)}…` : line;
}
