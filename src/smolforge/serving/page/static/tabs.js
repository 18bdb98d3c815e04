// The tabs of the page. The first one is chosen by what the model can do, until the visitor chooses one.

const byId = (id) => document.getElementById(id);

export class Tabs extends EventTarget {
  constructor(first) {
    super();
    this.all = [...document.querySelectorAll("[role=tab]")];
    this.chosen = false; // by the visitor
    for (const tab of this.all) {
      const name = tab.getAttribute("aria-controls");
      tab.addEventListener("click", () => { this.chosen = true; this.open(name); });
      tab.addEventListener("keydown", (key) => this.walk(tab, key));
    }
    this.open(first);
  }

  open(name) {
    for (const tab of this.all) {
      const shown = tab.getAttribute("aria-controls") === name;
      tab.setAttribute("aria-selected", String(shown));
      tab.tabIndex = shown ? 0 : -1;
      byId(tab.getAttribute("aria-controls")).hidden = !shown;
    }
    this.shown = name;
    this.dispatchEvent(new Event("open"));
  }

  // Shows or hides a tab, and opens the one that the visitor most likely wants.
  offer(name, offered, otherwise) {
    const tab = byId(`tab-${name}`), news = offered && tab.hidden;
    tab.hidden = !offered;
    if (news && !this.chosen) this.open(name);
    if (!offered && this.shown === name) this.open(otherwise);
  }

  walk(tab, key) {
    const go = { ArrowRight: 1, ArrowLeft: -1 }[key.key];
    if (!go) return;
    const shown = this.all.filter((other) => !other.hidden);
    const next = shown[(shown.indexOf(tab) + go + shown.length) % shown.length];
    next.focus();
    next.click();
  }
}
