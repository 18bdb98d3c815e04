// The Markdown of a model, drawn safely: what it writes is never run, loads nothing, and can only be read, copied and,
// where it is a link, followed. marked reads it, DOMPurify keeps what is listed here.

import { copy, make } from "./dom.js";

const { DOMPurify, marked } = window; // vendored, loaded before this module

const ALLOWED = {
  ALLOWED_TAGS: ["p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "strong", "em", "del", "code", "pre", "blockquote",
    "ul", "ol", "li", "a", "table", "thead", "tbody", "tr", "th", "td", "#text"],
  ALLOWED_ATTR: ["href", "title", "start", "align", "class"],
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  RETURN_DOM_FRAGMENT: true,
};
DOMPurify.addHook("uponSanitizeAttribute", (element, attribute) => {
  if (attribute.attrName === "class") attribute.keepAttr = /^language-[\w+#.-]+$/.test(attribute.attrValue);
});
DOMPurify.addHook("afterSanitizeAttributes", (element) => {
  if (element.tagName !== "A" || !element.hasAttribute("href")) return;
  element.setAttribute("target", "_blank");
  element.setAttribute("rel", "noopener noreferrer nofollow");
});

const escaped = (text) => text.replace(/[&<>"]/g, (sign) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[sign]);

const reader = new marked.Marked({
  gfm: true, breaks: true,
  renderer: {
    // Tags are shown as the model wrote them.
    html: ({ text, block }) => (block ? `<p>${escaped(text)}</p>` : escaped(text)),
    // A picture would be fetched from somewhere: it becomes a link.
    image: ({ href, text }) => `<a href="${escaped(href)}">${escaped(text || href)}</a>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
  },
});

// The part of a page that shows one text. While the text grows, only blocks that changed are drawn again.
export class MarkdownView {
  constructor(place) {
    this.place = place;
    this.blocks = []; // { raw, nodes } of each block of the text
  }

  show(text) {
    const found = reader.lexer(text);
    let same = 0;
    while (same < this.blocks.length && this.blocks[same].raw === found[same]?.raw) same += 1;
    this.blocks.splice(same).forEach(({ nodes }) => nodes.forEach((node) => node.remove()));
    for (const block of found.slice(same)) {
      const nodes = draw(block);
      this.place.append(...nodes);
      this.blocks.push({ raw: block.raw, nodes });
    }
  }
}

function draw(block) {
  const fragment = DOMPurify.sanitize(reader.parser([block]), ALLOWED);
  for (const pre of fragment.querySelectorAll("pre")) pre.replaceWith(codeBlock(pre));
  for (const item of fragment.querySelectorAll("li")) item.classList.toggle("task", /^[☑☐] /.test(item.textContent));
  for (const table of fragment.querySelectorAll("table")) {
    const frame = make("div", { class: "table", tabindex: "0" });
    table.replaceWith(frame);
    frame.append(table);
  }
  return [...fragment.childNodes];
}

function codeBlock(pre) {
  const code = pre.textContent.replace(/\n$/, "");
  const language = pre.querySelector("code")?.className.replace("language-", "") ?? "";
  const copier = make("button", { type: "button", class: "quiet", "aria-label": "Copy the code",
    onclick: (click) => copy(code, click.currentTarget) }, "Copy");
  return make("div", { class: "code-block" },
    make("div", { class: "code-head" }, make("span", {}, language || "text"), copier),
    make("pre", { tabindex: "0" }, make("code", {}, code)));
}
