// The conversations of this browser, each under a key of its own in localStorage. Where that is full, forbidden or
// damaged, the page goes on with what it has in memory and says so.

import { Conversation } from "./conversation.js";

// Two servers under one host, each below its own path, keep theirs apart.
const PREFIX = `smolforge-chat ${window.location.pathname} `;
const OPEN = `${PREFIX}open`; // in sessionStorage: the conversation that a reload shows again

export class ConversationStore {
  constructor() {
    this.all = new Map(); // id -> conversation
    this.damaged = []; // keys of entries that cannot be read
    this.problem = null;
    try {
      this.place = window.localStorage;
      for (const key of Object.keys(this.place)) if (key.startsWith(PREFIX)) this.read(key);
    } catch {
      this.problem = "This browser keeps nothing for this page: conversations are gone when it closes.";
    }
  }

  read(key) {
    try {
      const found = Conversation.fromText(this.place.getItem(key));
      if (PREFIX + found.id !== key) throw new Error("the key belongs to another conversation");
      this.all.set(found.id, found);
    } catch {
      this.damaged.push(key);
    }
  }

  // Newest first.
  list() { return [...this.all.values()].sort((a, b) => b.changed - a.changed); }

  save(conversation) {
    this.all.set(conversation.id, conversation);
    if (!this.place) return;
    try {
      this.place.setItem(PREFIX + conversation.id, conversation.toText());
      this.problem = null;
    } catch {
      this.problem = "The browser's room for this page is used up: what is new is lost when the page closes. Export it, or delete other conversations.";
    }
  }

  remove(conversation) {
    this.all.delete(conversation.id);
    this.place?.removeItem(PREFIX + conversation.id);
  }

  removeDamaged() {
    for (const key of this.damaged.splice(0)) this.place.removeItem(key);
  }

  // Takes over what another tab of the browser saved or deleted; the id of that conversation, or null.
  follow({ key, newValue }) {
    if (!key?.startsWith(PREFIX)) return null;
    const id = key.slice(PREFIX.length);
    if (newValue === null) this.all.delete(id);
    else this.read(key);
    return id;
  }

  get opened() {
    try { return this.all.get(window.sessionStorage.getItem(OPEN)) ?? null; } catch { return null; }
  }

  set opened(conversation) {
    try { window.sessionStorage.setItem(OPEN, conversation.id); } catch { /* a reload begins a new one */ }
  }
}
