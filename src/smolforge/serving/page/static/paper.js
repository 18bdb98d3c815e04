// The sheet that the model writes on: tokens as they come, how likely each was, what else it could have been.
//
// A take is one text: the prompt, the tokens after it, the seed. Submitting, regenerating and branching begin a new
// take, continuing prolongs one; the arrows go back to earlier takes.

import { copy, events, make, number, swap } from "./dom.js";
import { keep, kept } from "./page_state.js";
import { Popover } from "./popover.js";
import * as settings from "./settings.js";

const percent = (logprob) => 100 * Math.exp(logprob);

// 0 for what the model expected, 1 for what surprised it: 1 in 2 is hardly a surprise, 1 in 1000 is a full one.
const surprise = (logprob) => Math.min(1, Math.max(0, (-logprob - 0.3) / 6.6));

const KEPT_TAKES = 8; // newest ones, which survive a reload
const LINK = "Copy a link that writes this text again";

export class Paper {
  constructor(place) {
    this.takes = [];
    this.at = -1;
    this.running = null;
    this.frame = null;
    this.state = {};
    this.place = place;
    this.popover = new Popover((index, choice) => this.branch(index, choice));
    this.mount();
    this.restore();
    window.addEventListener("pagehide", () => this.save());
  }

  get take() { return this.takes[this.at]; }

  know(state) {
    this.state = state;
    this.describe();
  }

  // Texts survive a reload; one that was being written counts as stopped.
  save() {
    const takes = this.takes.slice(-KEPT_TAKES).map((take) => ({ ...take, waiting: false, finish: take.finish ?? "stopped" }));
    const at = Math.max(0, this.at - (this.takes.length - takes.length));
    if (!keep({ takes, at })) keep({ takes: this.take ? [this.take] : [], at: 0 });
  }

  restore() {
    const { takes = [], at = -1 } = kept();
    if (!takes.length) return;
    this.takes = takes;
    this.show(Math.min(at, takes.length - 1));
  }

  mount() {
    const button = (label, title, action, more = {}) =>
      make("button", { type: "button", class: "quiet", title, onclick: action, ...more }, label);
    this.text = make("div", {
      id: "text", class: "text", role: "textbox", "aria-readonly": "true", "aria-multiline": "true",
      "aria-label": "What the model wrote", tabindex: "0",
    });
    this.figures = make("div", { id: "figures", class: "figures", role: "status", "aria-live": "off" });
    this.meter = make("div", { class: "meter", title: "how much of the context is used" }, make("span"));
    this.buttons = {
      regenerate: button("Retry", "Write again with the seed that is set", () => this.regenerate(), { id: "regenerate" }),
      continue: button("Continue", "Write on from here", () => this.prolong(), { id: "continue" }),
      copy: button("Copy", "Copy the text", (click) => copy(this.whole(), click.currentTarget), { id: "copy" }),
      link: button("Link", LINK,
        (click) => copy(settings.toLink(this.take?.knobs), click.currentTarget), { id: "link" }),
      back: button("‹", "Earlier take", () => this.show(this.at - 1), { id: "back", "aria-label": "Earlier take" }),
      forth: button("›", "Later take", () => this.show(this.at + 1), { id: "forth", "aria-label": "Later take" }),
    };
    this.takeLabel = make("span", { class: "takes" });
    this.turns = make("span", { class: "turns" }, this.buttons.back, this.takeLabel, this.buttons.forth);
    this.colours = make("input", { type: "checkbox", id: "colours", checked: true });
    this.colours.addEventListener("change", () => this.text.classList.toggle("plain", !this.colours.checked));
    const legend = make("label", { class: "legend", for: "colours", title: "Colour words by how surprising they were" }, this.colours, " expected",
      ...[0.12, 0.4, 0.7, 1].map((s) => make("i", { style: { "--s": s } })), "surprising");
    this.problem = make("p", { id: "problem", class: "problem", role: "alert", hidden: true });
    this.welcome();
    this.place.replaceChildren(make("section", { class: "paper" },
      make("div", { class: "tools" }, this.buttons.regenerate, this.buttons.continue, this.buttons.copy,
        this.buttons.link, this.turns),
      this.problem, this.text, make("div", { class: "foot" }, this.figures, legend), this.meter));
    this.text.addEventListener("keydown", (key) => this.walk(key));
    this.text.addEventListener("pointerover", (over) => {
      const token = over.target.closest?.(".token");
      if (token && over.pointerType === "mouse") this.open(token, false);
    });
    this.text.addEventListener("click", (click) => {
      const token = click.target.closest?.(".token");
      if (token) this.open(token, true);
    });
    this.describe();
  }

  welcome() {
    this.text.replaceChildren(make("p", { class: "welcome" },
      "What the model writes appears here. Point at a word to see how sure it was and what else it thought of; " +
      "choose another word, and the story goes on from there."));
  }

  // What the buttons ask for.

  submit(knobs) {
    // On a phone the sheet may be out of sight.
    const box = this.place.getBoundingClientRect();
    if (box.top > window.innerHeight - 120 || box.bottom < 80) this.place.scrollIntoView({ behavior: "smooth", block: "start" });
    return this.start({ knobs, prompt: knobs.prompt, tokens: [] }, []);
  }

  regenerate() {
    document.getElementById("submit").click();
  }

  prolong() {
    if (!this.take || this.running) return;
    const take = this.take;
    take.several = true;
    this.write(take, take.tokens.map((token) => token.id), { ...settings.current(), seed: take.seed });
  }

  branch(index, choice) {
    const from = this.take;
    this.stop();
    const before = from.tokens.slice(0, index);
    const taken = { id: choice[0], text: choice[1].startsWith("bytes:") ? "" : choice[1], p: choice[2],
      top: from.tokens[index].top, chosen: true };
    const left = Math.max(16, (from.knobs.max_tokens ?? settings.sampling.values.max_tokens) - index - 1);
    this.start({ knobs: { ...from.knobs, max_tokens: left }, prompt: from.prompt, tokens: [...before, taken], several: true },
      [...before, taken].map((token) => token.id));
  }

  stop() { this.running?.abort(); }

  clear() {
    this.stop();
    this.takes = [];
    this.at = -1;
    this.welcome();
    this.describe();
    this.save();
  }

  whole() { return this.take ? this.take.prompt + this.take.tokens.map((token) => token.text).join("") : ""; }

  // Writing.

  start(take, ids) {
    this.stop();
    this.takes.push({ ...take, seed: take.knobs.seed, finish: null, problem: null });
    if (this.takes.length > 50) this.takes.shift();
    this.at = this.takes.length - 1;
    this.draw();
    return this.write(this.take, ids, take.knobs);
  }

  async write(take, ids, knobs) {
    const abort = new AbortController();
    this.running = abort;
    Object.assign(take, { finish: null, problem: null, waiting: true, began: 0, count: 0, rate: 0 });
    this.mark();
    this.describe();
    try {
      await events("page/write", { ...settings.forPage(knobs), ids }, abort.signal, (news) => this.take_in(take, news));
      if (!take.finish) take.problem = "the connection ended early";
    } catch (error) {
      if (error.name === "AbortError") take.finish = "stopped";
      else take.problem = error.message;
    }
    take.waiting = false;
    if (this.running === abort) this.running = null;
    this.grow();
    this.mark();
    this.save();
  }

  take_in(take, news) {
    if (news.start) {
      Object.assign(take, { promptTokens: news.start.prompt, context: news.start.context, step: news.start.step });
      return;
    }
    const now = performance.now();
    if (take.waiting) {
      take.waiting = false;
      take.began = now;
    }
    const fresh = news.tokens;
    if (news.rest) fresh.push({ id: null, text: news.rest, p: 0, top: [] });
    take.tokens.push(...fresh.filter((token) => token.id !== null));
    take.count += fresh.length;
    if (take.count > 1) take.rate = (1000 * (take.count - 1)) / Math.max(1, now - take.began);
    if (news.finish) take.finish = news.finish;
    if (news.rest && take.tokens.length) { // broken characters at the end
      take.tokens.at(-1).text += news.rest;
      if (take === this.take) this.text.querySelector(`[data-index="${take.tokens.length - 1}"]`)?.remove();
    }
    this.frame ??= requestAnimationFrame(() => this.grow());
  }

  // Drawing.

  span(token, index) {
    const span = make("span", {
      class: `token${token.chosen ? " chosen" : ""}`, "data-index": index, tabindex: "-1",
      style: { "--s": surprise(token.p).toFixed(3) },
    });
    // The space before a word belongs to its token but takes no colour: marks stay as wide as the words.
    const [, space, word] = token.text.match(/^(\s*)([^]*)$/);
    span.append(word ? space : "", make("span", { class: "mark" }, word || space));
    return span;
  }

  draw() {
    this.popover.close();
    const prompt = make("span", { class: "said" });
    prompt.textContent = this.take.prompt;
    this.text.replaceChildren(prompt, ...this.take.tokens.map((token, i) => this.span(token, i)));
    this.mark();
  }

  // Draws the tokens that came since it last did. The whole text is laid out then: once for a frame, not for a token.
  grow() {
    cancelAnimationFrame(this.frame);
    this.frame = null;
    if (this.take) { // not cleared meanwhile
      const drawn = this.text.getElementsByClassName("token").length;
      const bottom = this.text.scrollHeight - this.text.scrollTop - this.text.clientHeight < 40;
      this.text.append(...this.take.tokens.slice(drawn).map((token, i) => this.span(token, drawn + i)));
      if (bottom) this.text.scrollTop = this.text.scrollHeight;
    }
    this.describe();
  }

  mark() {
    this.text.querySelector(".end")?.remove();
    const { finish } = this.take ?? {};
    const word = { stop: "end of text", length: null, stopped: "stopped" }[finish];
    if (word) this.text.append(make("span", { class: "end" }, word));
  }

  show(index) {
    if (index < 0 || index >= this.takes.length) return;
    this.at = index;
    this.draw();
    this.describe();
  }

  describe() {
    const take = this.take;
    const busy = Boolean(this.running);
    swap(document.getElementById("submit"), document.getElementById("stop"), busy);
    this.text.setAttribute("aria-busy", String(busy));
    this.text.classList.toggle("writing", busy);
    this.buttons.regenerate.disabled = busy || !take;
    this.buttons.continue.disabled = busy || !take || Boolean(take?.problem && !take.tokens.length);
    this.buttons.copy.disabled = !take;
    this.buttons.link.disabled = Boolean(take?.several);
    this.buttons.link.title = take?.several ? "A link cannot carry a text that was branched or continued" : LINK;
    this.problem.hidden = !take?.problem; // above the text: the end of a long one is out of sight
    this.problem.textContent = take?.problem ?? "";
    this.buttons.back.disabled = this.at <= 0;
    this.buttons.forth.disabled = this.at >= this.takes.length - 1;
    this.turns.hidden = this.takes.length < 2;
    this.takeLabel.textContent = take ? `${this.at + 1} of ${this.takes.length}` : "";
    if (!take) {
      this.figures.textContent = "";
      this.meter.firstChild.style.width = "0";
      return;
    }
    const context = take.context ?? this.state.context;
    const used = (take.promptTokens ?? 0) + take.tokens.length;
    const facts = [];
    if (take.waiting) facts.push(this.state.waiting > 1 ? `waiting, ${this.state.waiting} before you` : "thinking …");
    facts.push(`${number(take.tokens.length)} tokens`);
    if (take.rate) facts.push(`${number(take.rate, take.rate < 20 ? 1 : 0)} tokens/s`);
    if (context) facts.push(`${number(used)} of ${number(context)} context`);
    facts.push(`seed ${take.seed}`);
    if (take.step !== null && take.step !== undefined) facts.push(`step ${number(take.step)}`);
    this.figures.textContent = facts.join(" · ");
    this.meter.firstChild.style.width = context ? `${Math.min(100, (100 * used) / context)}%` : "0";
  }

  // Alternatives.

  open(element, pinned) {
    const index = Number(element.dataset.index);
    const token = this.take?.tokens[index];
    if (token) this.popover.show(element, token, index, percent, pinned);
  }

  walk(key) {
    const tokens = [...this.text.querySelectorAll(".token")].filter((token) => token.textContent);
    if (!tokens.length) return;
    const at = tokens.indexOf(document.activeElement);
    const go = { ArrowRight: 1, ArrowLeft: -1 }[key.key];
    if (go) {
      key.preventDefault();
      const next = tokens[Math.min(tokens.length - 1, Math.max(0, at < 0 ? 0 : at + go))];
      next.focus();
      this.open(next, false);
    } else if (["Enter", "ArrowDown"].includes(key.key) && at >= 0 && !key.ctrlKey && !key.metaKey) {
      key.preventDefault();
      this.open(tokens[at], true);
      this.popover.focus();
    }
  }
}
