// The small card at a token: how sure the model was, and the likeliest alternatives, each a button that branches.

import { make } from "./dom.js";

// Spaces and line breaks must be seen to be chosen.
const visible = (text) => (text.startsWith("bytes:") ? text : text.replace(/^ /, "␣").replace(/\n/g, "⏎").replace(/\t/g, "⇥")) || "∅";

export class Popover {
  constructor(choose) {
    this.choose = choose;
    this.card = make("div", { id: "popover", class: "popover", role: "dialog", "aria-label": "Alternatives", hidden: true });
    this.pinned = false;
    this.card.addEventListener("keydown", (key) => this.keys(key));
    this.card.addEventListener("pointerleave", () => { if (!this.pinned) this.close(); });
    document.addEventListener("pointerdown", (down) => {
      if (!this.card.contains(down.target) && !down.target.closest?.(".token")) this.close();
    });
    document.addEventListener("pointerover", (over) => {
      if (!this.pinned && !this.card.hidden && !this.card.contains(over.target) && !over.target.closest?.(".token")) this.later();
      else clearTimeout(this.leaving);
    });
    window.addEventListener("resize", () => this.close());
    document.addEventListener("scroll", () => this.close(), true);
  }

  show(anchor, token, index, percent, pinned) {
    clearTimeout(this.leaving);
    if (this.pinned && !pinned && !this.card.hidden) return;
    this.anchor?.classList.remove("open");
    this.anchor = anchor;
    this.pinned = pinned;
    anchor.classList.add("open");
    const share = percent(token.p);
    const rows = token.top.map((choice) => {
      const same = choice[0] === token.id;
      const value = percent(choice[2]);
      return make("li", {}, make("button", {
        type: "button", class: "choice", disabled: same, "aria-label": `${choice[1]}, ${value.toFixed(1)} percent${same ? ", chosen" : ", branch here"}`,
        onclick: () => { this.close(); this.choose(index, choice); },
      }, make("span", { class: "bar", style: { width: `${Math.max(1, value)}%` } }),
      make("span", { class: "word" }, visible(choice[1])), make("span", { class: "share" }, `${value.toFixed(value < 1 ? 2 : 1)}%`)));
    });
    this.card.replaceChildren(
      make("p", {}, make("b", {}, visible(token.text)), ` had ${share < 0.1 ? "less than 0.1" : share.toFixed(1)}%`),
      make("ol", {}, ...rows), make("p", { class: "hint" }, "Choose one to continue from there."));
    if (!this.card.isConnected) document.body.append(this.card);
    this.card.hidden = false;
    this.put();
  }

  // Below the token, or above where there is no room; always within the window.
  put() {
    // A token may be broken over two lines: its longer part counts.
    const parts = [...this.anchor.getClientRects()].sort((a, b) => b.width - a.width);
    const at = parts[0] ?? this.anchor.getBoundingClientRect();
    const { offsetWidth: width, offsetHeight: height } = this.card;
    const below = at.bottom + height + 8 < window.innerHeight;
    const top = below ? at.bottom + 3 : Math.max(4, at.top - height - 3);
    const left = Math.min(Math.max(6, at.left - 8), window.innerWidth - width - 6);
    Object.assign(this.card.style, { left: `${left}px`, top: `${top}px` });
  }

  focus() { this.card.querySelector("button:not(:disabled)")?.focus({ preventScroll: true }); }

  later() {
    clearTimeout(this.leaving);
    this.leaving = setTimeout(() => this.close(), 250);
  }

  close() {
    clearTimeout(this.leaving);
    this.anchor?.classList.remove("open");
    this.card.hidden = true;
    this.pinned = false;
  }

  keys(key) {
    const buttons = [...this.card.querySelectorAll("button:not(:disabled)")];
    const go = { ArrowDown: 1, ArrowUp: -1 }[key.key];
    if (go) {
      key.preventDefault();
      const at = buttons.indexOf(document.activeElement);
      buttons[(at + go + buttons.length) % buttons.length]?.focus();
    } else if (key.key === "Escape") {
      key.stopPropagation();
      const anchor = this.anchor;
      this.close();
      anchor?.focus();
    }
  }
}
