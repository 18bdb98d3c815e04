// What a reload of the page shows again: the open tab, and the form and texts of the Write tab. It is kept in
// sessionStorage, so each tab of the browser has its own, and it is gone when that closes.

const KEY = `smolforge-page ${window.location.pathname}`;

export function kept() {
  try { return JSON.parse(window.sessionStorage.getItem(KEY)) ?? {}; } catch { return {}; }
}

// Keeps these values beside the others; false where the browser has no room for them.
export function keep(values) {
  try {
    window.sessionStorage.setItem(KEY, JSON.stringify({ ...kept(), ...values }));
    return true;
  } catch {
    return false;
  }
}
