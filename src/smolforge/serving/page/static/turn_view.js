// One turn of a conversation on the page: its text, the buttons below it, and how it was written.

import { copy, make, number } from "./dom.js";
import { MarkdownView } from "./markdown.js";

const ENDS = { length: "the maximum length was reached", stopped: "stopped" };

export class TurnView {
  // `actions`: what the buttons do, each with the number of the turn: edit(at, text), retry(at), prolong(at), choose(at).
  constructor(conversation, at, actions) {
    Object.assign(this, { conversation, at, actions, turn: conversation.turns[at] });
    this.body = make("div", { class: "said-text" });
    this.markdown = new MarkdownView(this.body);
    this.figures = make("span", { class: "figures" });
    this.problem = make("p", { class: "note bad", role: "alert", hidden: true });
    this.label = make("span", { class: "takes" });
    this.back = this.button("‹", "Earlier version", () => this.step(-1));
    this.forth = this.button("›", "Later version", () => this.step(1));
    this.versions = make("span", { class: "versions" }, this.back, this.label, this.forth);
    this.copier = this.button("Copy", "Copy this text", (click) => copy(this.turn.content, click.currentTarget));
    this.buttons = this.turn.role === "user" ? this.questionButtons() : this.answerButtons();
    this.tools = make("div", { class: "turn-tools" }, this.copier, ...this.buttons, this.versions, this.figures);
    this.element = make("article", { class: `turn ${this.turn.role}`, "aria-label": this.turn.role === "user" ? "You" : "Model" },
      this.body, this.problem, this.tools);
  }

  button(text, label, action) {
    return make("button", { type: "button", class: "quiet", title: label, "aria-label": label, onclick: action }, text);
  }

  questionButtons() {
    return [this.button("Edit", "Edit this question and ask again", () => this.edit())];
  }

  answerButtons() {
    this.retry = this.button("Retry", "Answer again", () => this.actions.retry(this.at));
    this.prolong = this.button("Continue", "Continue this answer", () => this.actions.prolong(this.at));
    return [this.retry, this.prolong];
  }

  step(by) {
    const versions = this.conversation.versions(this.at);
    this.actions.choose(versions[versions.indexOf(this.at) + by]);
  }

  // Draws what has changed. `run`: the answer is being written, and how many requests wait before it.
  update({ running = false, waiting = 0, last = false } = {}) {
    const { turn } = this, { role, content } = turn;
    if (role === "user") this.body.textContent = content;
    else this.markdown.show(content);
    this.element.classList.toggle("answering", running);
    this.element.classList.toggle("last", last);
    this.body.classList.toggle("empty", !running && !content && !turn.problem);
    this.problem.hidden = !turn.problem;
    if (this.problem.textContent !== (turn.problem ?? "")) this.problem.textContent = turn.problem ?? "";
    const versions = this.conversation.versions(this.at), place = versions.indexOf(this.at);
    this.versions.hidden = versions.length < 2;
    this.label.textContent = `${place + 1} of ${versions.length}`;
    this.back.disabled = place === 0;
    this.forth.disabled = place === versions.length - 1;
    this.copier.hidden = running || !content;
    if (role === "user") return;
    this.prolong.hidden = running || !last || !content || !(turn.problem || turn.finish in ENDS);
    this.figures.textContent = running && !turn.tokens ? (waiting > 1 ? `waiting, ${waiting} before you` : "thinking …") : this.facts();
  }

  facts() {
    const { tokens, rate, used, context, step, finish, seed } = this.turn;
    const facts = [];
    if (tokens) facts.push(`${number(tokens)} ${tokens === 1 ? "token" : "tokens"}`);
    if (rate) facts.push(`${number(rate, rate < 20 ? 1 : 0)} tokens/s`);
    if (used && context) facts.push(`${number(used)} of ${number(context)} context`);
    if (seed !== undefined) facts.push(`seed ${seed}`);
    if (step !== undefined && step !== null) facts.push(`step ${number(step)}`);
    if (finish in ENDS) facts.push(ENDS[finish]);
    return facts.join(" · ");
  }

  // Puts a text field in the place of the question.
  edit() {
    const area = make("textarea", { class: "edit", "aria-label": "Edit the question", rows: Math.min(10, this.turn.content.split("\n").length + 1) });
    area.value = this.turn.content;
    const close = () => { form.replaceWith(this.body); this.tools.hidden = false; };
    const form = make("form", { class: "edit-form" }, area, make("div", { class: "line" },
      make("button", { class: "primary" }, "Ask again"),
      make("button", { type: "button", class: "tool", onclick: () => { close(); this.buttons[0].focus(); } }, "Cancel")));
    form.addEventListener("submit", (submit) => {
      submit.preventDefault();
      if (!area.value.trim()) return;
      close();
      this.actions.edit(this.at, area.value);
    });
    area.addEventListener("keydown", (key) => {
      if (key.key === "Escape") { key.stopPropagation(); close(); this.buttons[0].focus(); }
      if (key.key === "Enter" && !key.shiftKey && !key.isComposing) { key.preventDefault(); form.requestSubmit(); }
    });
    this.body.replaceWith(form);
    this.tools.hidden = true;
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }
}
