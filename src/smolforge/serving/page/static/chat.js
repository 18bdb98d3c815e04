// The Chat tab: the conversations of this browser, the one that is shown, and its answers while they are written.

import { ChatSettings } from "./chat_settings.js";
import { Conversation } from "./conversation.js";
import { ConversationStore } from "./conversation_store.js";
import { events, make, swap } from "./dom.js";
import { TurnView } from "./turn_view.js";

const EXAMPLES = ["What is the capital of France?", "Write a haiku about rain.", "Explain gravity to a child.",
  "Write a Python function that reverses a string."];
const SAVE_EVERY = 1000; // milliseconds, while an answer is written
const NEAR_END = 60; // pixels: the thread follows an answer while its end is this near
const byId = (id) => document.getElementById(id);
const touch = window.matchMedia("(pointer: coarse)"); // no keyboard: focus would open one over half the screen

export class Chat {
  constructor() {
    this.state = {};
    this.running = new Map(); // conversation -> { abort, at }
    this.views = new Map(); // turn -> its view, of the conversation that is shown
    this.store = new ConversationStore();
    this.settings = new ChatSettings(() => this.keep());
    this.thread = byId("thread");
    this.question = byId("question");
    this.following = true;
    this.mount();
    this.open(this.store.opened ?? new Conversation());
    this.tellOfStorage();
  }

  mount() {
    const on = (id, event, action) => byId(id).addEventListener(event, action);
    on("composer", "submit", (submit) => { submit.preventDefault(); this.send(); });
    on("question", "keydown", (key) => this.keys(key));
    on("question", "input", () => this.fit());
    on("stop-answer", "click", () => { this.stop(); this.focus(); });
    on("new-conversation", "click", () => this.begin());
    on("show-conversations", "click", () => this.drawer(!byId("conversations").classList.contains("open")));
    on("conversation-title", "change", () => { this.conversation.title = byId("conversation-title").value.trim(); this.keep(); });
    on("export-markdown", "click", () => this.export("md", this.conversation.toMarkdown()));
    on("export-json", "click", () => this.export("json", this.conversation.toExport(this.state.model)));
    on("to-end", "click", () => { this.thread.scrollTop = this.thread.scrollHeight; this.focus(); });
    this.thread.addEventListener("scroll", () => {
      this.following = this.thread.scrollHeight - this.thread.scrollTop - this.thread.clientHeight < NEAR_END;
      byId("to-end").hidden = this.following;
    });
    for (const leaving of ["beforeunload", "pagehide"]) window.addEventListener(leaving, () => this.leave());
    window.addEventListener("storage", (event) => this.follow(event));
  }

  know(state) {
    this.state = state;
    if (state.chat) this.settings.sampling.learn(state.chat.values);
  }

  // Keys of the tab; of the whole document, while the tab is shown.
  shortcut(key) {
    if (document.querySelector("dialog[open]")) return;
    if (key.key === "Escape") {
      if (byId("conversations").classList.contains("open")) this.drawer(false);
      else this.stop();
    } else if (key.key.toLowerCase() === "o" && key.shiftKey && (key.ctrlKey || key.metaKey)) {
      key.preventDefault();
      this.begin();
    }
  }

  keys(key) {
    if (key.key === "Enter" && !key.shiftKey && !key.isComposing && !touch.matches) {
      key.preventDefault();
      this.send();
    } else if (key.key === "ArrowUp" && !this.question.value) {
      const asked = this.conversation.path().findLast((at) => this.conversation.turns[at].role === "user");
      if (asked === undefined) return;
      key.preventDefault();
      this.views.get(asked).edit();
    }
  }

  // The conversations.

  begin() {
    this.drawer(false);
    if (this.conversation.turns.length) this.open(new Conversation({ settings: structuredClone(this.conversation.settings) }));
    this.focus();
  }

  open(conversation) {
    this.conversation = conversation;
    this.store.opened = conversation;
    this.views.clear();
    this.thread.replaceChildren();
    this.settings.show(conversation.settings);
    byId("conversation-title").value = conversation.title;
    this.following = true;
    this.draw();
  }

  // Saves the conversation that is shown, once something was asked in it.
  keep(conversation = this.conversation) {
    if (conversation.turns.length) this.store.save(conversation);
    this.tellOfStorage();
    this.drawList();
  }

  remove(conversation) {
    this.stop(conversation);
    this.store.remove(conversation);
    if (conversation === this.conversation) this.open(new Conversation());
    this.drawList();
    this.tell(`“${conversation.name}” is deleted.`, "Undo", () => { this.keep(conversation); this.open(conversation); });
    byId("new-conversation").focus();
  }

  follow(event) {
    const id = this.store.follow(event);
    if (id === null) return;
    if (id === this.conversation.id && !this.running.has(this.conversation) && this.store.all.has(id)) this.open(this.store.all.get(id));
    this.drawList();
  }

  export(kind, text) {
    const link = make("a", { href: URL.createObjectURL(new Blob([text])),
      download: `${this.conversation.name.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "")}.${kind}` });
    link.click();
    URL.revokeObjectURL(link.href);
  }

  // Questions and answers.

  send() {
    const text = this.question.value;
    if (!text.trim() || this.running.has(this.conversation)) return;
    this.question.value = "";
    this.fit();
    this.ask({ role: "user", content: text, parent: this.conversation.last });
  }

  ask(turn) {
    this.tell("");
    const at = this.conversation.add(turn);
    byId("conversation-title").value = this.conversation.title;
    this.focus();
    this.answer(at);
  }

  answer(parent) {
    this.stop();
    const { conversation, state } = this, { seed } = conversation.settings;
    const turn = { role: "assistant", content: "", parent, tokens: 0, context: state.context, step: state.step };
    const at = conversation.add(turn);
    if (seed !== null) turn.seed = seed + conversation.versions(at).length - 1; // the same would answer the same
    this.following = true;
    this.write(conversation, at, conversation.messages(parent));
  }

  edit(at, text) {
    this.stop();
    this.ask({ role: "user", content: text, parent: this.conversation.turns[at].parent });
  }

  retry(at) {
    this.answer(this.conversation.turns[at].parent);
    this.views.get(this.conversation.last).retry.focus({ preventScroll: true });
  }

  // The API continues a last message of the assistant.
  prolong(at) {
    this.write(this.conversation, at, this.conversation.messages(at));
    this.views.get(at).retry.focus({ preventScroll: true });
  }

  choose(at) {
    this.conversation.choose(at);
    this.keep();
    this.draw();
    this.views.get(at).versions.querySelector("button:not(:disabled)").focus({ preventScroll: true });
  }

  stop(conversation = this.conversation) { this.running.get(conversation)?.abort.abort(); }

  // Before the page is gone, which the browser would call a network error.
  leave() {
    this.running.forEach(({ abort }, conversation) => {
      this.store.save(conversation);
      abort.abort();
    });
  }

  // The body of a request: what the user changed, and what the page suggests where the model does not say.
  request(messages, seed = this.conversation.settings.seed) {
    const { sampling } = this.conversation.settings;
    return { messages, ...this.state.chat?.suggested, ...sampling, ...(seed === null || seed === undefined ? {} : { seed }) };
  }

  // The last question, or an example, as a request for the API tab.
  forApi() {
    const asked = this.conversation.messages().filter(({ role }) => role !== "assistant");
    const messages = [...asked.filter(({ role }) => role === "system"), asked.findLast(({ role }) => role === "user") ?? { role: "user", content: EXAMPLES[0] }];
    const { top_k, min_p, repetition_penalty, ...main } = this.request(messages); // those three are not OpenAI's
    return { route: "chat/completions", main, more: { top_k, min_p, repetition_penalty } };
  }

  async write(conversation, at, messages) {
    const turn = conversation.turns[at], run = { abort: new AbortController(), at, before: turn.tokens, began: 0, saved: performance.now() };
    Object.assign(turn, { finish: null, problem: null });
    this.running.set(conversation, run);
    this.keep(conversation);
    this.draw();
    this.announce("The model is writing.");
    try {
      const body = { ...this.request(messages, turn.seed), stream: true, stream_options: { include_usage: true } };
      await events("v1/chat/completions", body, run.abort.signal, (chunk) => this.receive(conversation, turn, run, chunk));
      if (!turn.finish) turn.problem = "the connection ended early";
    } catch (error) {
      if (error.name === "AbortError") turn.finish = "stopped";
      else turn.problem = error.message;
    }
    if (this.running.get(conversation) === run) this.running.delete(conversation);
    if (this.store.all.has(conversation.id)) this.keep(conversation);
    if (conversation !== this.conversation) return;
    this.draw();
    this.announce(turn.problem ? "" : `${turn.finish === "stopped" ? "Stopped" : "The model wrote"}: ${turn.content}`);
  }

  receive(conversation, turn, run, chunk) {
    const now = performance.now(), choice = chunk.choices[0];
    if (chunk.usage) {
      turn.tokens = run.before + chunk.usage.completion_tokens;
      turn.used = chunk.usage.prompt_tokens + chunk.usage.completion_tokens;
    } else if (!choice.delta.role) {
      turn.content += choice.delta.content ?? "";
      turn.finish = choice.finish_reason;
      if (!turn.finish) turn.tokens += 1;
      run.began ||= now;
      const written = turn.tokens - run.before;
      if (written > 1 && !turn.finish) turn.rate = (1000 * (written - 1)) / Math.max(1, now - run.began);
    }
    if (now - run.saved > SAVE_EVERY) {
      run.saved = now;
      this.store.save(conversation);
    }
    if (conversation === this.conversation && !run.drawing) {
      run.drawing = true;
      requestAnimationFrame(() => { run.drawing = false; if (this.running.get(conversation) === run) this.grow(run.at); });
    }
  }

  // Drawing.

  draw() {
    const { conversation } = this, path = conversation.path();
    const elements = path.length ? path.map((at) => this.view(at).element) : [this.welcome()];
    let same = 0; // what stays in its place keeps its focus
    while (same < elements.length && this.thread.children[same] === elements[same]) same += 1;
    while (this.thread.children.length > same) this.thread.lastElementChild.remove();
    this.thread.append(...elements.slice(same));
    path.forEach((at) => this.update(at));
    const busy = this.running.has(conversation);
    this.thread.setAttribute("aria-busy", String(busy));
    swap(byId("send"), byId("stop-answer"), busy);
    for (const id of ["export-markdown", "export-json"]) byId(id).disabled = !conversation.turns.length;
    this.drawList();
    this.scroll();
  }

  // Draws an answer that has grown.
  grow(at) {
    if (!this.views.has(at)) return;
    this.update(at);
    this.scroll();
  }

  scroll() { if (this.following) this.thread.scrollTop = this.thread.scrollHeight; }

  view(at) {
    const actions = { edit: (...what) => this.edit(...what), retry: (i) => this.retry(i), prolong: (i) => this.prolong(i), choose: (i) => this.choose(i) };
    if (!this.views.has(at)) this.views.set(at, new TurnView(this.conversation, at, actions));
    return this.views.get(at);
  }

  update(at) {
    const { conversation } = this, running = this.running.get(conversation)?.at === at;
    this.views.get(at).update({ running, waiting: this.state.waiting, last: at === conversation.last });
  }

  welcome() {
    const example = (text) => make("button", { type: "button", class: "example", onclick: () => {
      this.question.value = text;
      this.fit();
      this.focus();
    } }, text);
    return make("div", { class: "chat-welcome" }, make("h2", {}, "What would you like to talk about?"),
      make("div", { class: "examples", role: "group", "aria-label": "Example questions" }, ...EXAMPLES.map(example)));
  }

  drawList() {
    const known = this.store.list();
    byId("conversation-list").replaceChildren(...known.map((conversation) => {
      const shown = conversation.id === this.conversation.id;
      return make("li", { class: shown ? "shown" : null },
        make("button", { type: "button", class: "pick", "aria-current": shown ? "true" : null,
          onclick: () => { this.open(conversation); this.drawer(false); this.focus(); } },
        conversation.name, this.running.has(conversation) ? " …" : ""),
        make("button", { type: "button", class: "quiet", title: "Delete", "aria-label": `Delete “${conversation.name}”`,
          onclick: () => this.remove(conversation) }, "✕"));
    }));
    byId("no-conversations").hidden = known.length > 0;
  }

  // On a small window the list lies over the conversation.
  drawer(open) {
    const button = byId("show-conversations"), list = byId("conversations");
    if (list.classList.contains("open") === open) return;
    list.classList.toggle("open", open);
    button.setAttribute("aria-expanded", String(open));
    (open ? byId("new-conversation") : button).focus();
  }

  focus() { if (!touch.matches) this.question.focus(); }

  // The field grows with its text.
  fit() {
    this.question.style.height = "auto";
    this.question.style.height = `${this.question.scrollHeight}px`;
  }

  tellOfStorage() {
    const { problem, damaged } = this.store;
    if (problem) this.tell(problem);
    else if (damaged.length) {
      const count = damaged.length === 1 ? "One conversation" : `${damaged.length} conversations`;
      this.tell(`${count} of this browser cannot be read.`, "Remove what is damaged", () => this.store.removeDamaged());
    } else if (!byId("chat-notice").querySelector("button")) this.tell("");
  }

  // Shows a line above the composer, with a button that does something about it.
  tell(text, label = null, action = null) {
    const button = label && make("button", { type: "button", class: "tool", onclick: () => { this.tell(""); action(); } }, label);
    byId("chat-notice").replaceChildren(text, button ?? "");
    byId("chat-notice").hidden = !text;
  }

  // For screen readers, which are not told of each token.
  announce(text) { byId("announcer").textContent = text; }
}
