// Sets the colour scheme before the page is drawn: the visitor's choice, or that of the system.

(() => {
  let chosen = null;
  try { chosen = localStorage.getItem("smolforge-theme"); } catch { /* private window */ }
  const system = matchMedia("(prefers-color-scheme: dark)");
  const apply = () => { document.documentElement.dataset.theme = chosen ?? (system.matches ? "dark" : "light"); };
  apply();
  system.addEventListener("change", apply);
  window.toggleTheme = () => {
    chosen = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    try { localStorage.setItem("smolforge-theme", chosen); } catch { /* private window */ }
    apply();
    window.dispatchEvent(new Event("themechange"));
  };
})();
