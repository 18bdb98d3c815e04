// Makes the hover text of the plots prettier: a line, dots on the curves, and the words of the nearest row.
// Without this script the same words are the browser's own tooltips.
for (const plot of document.querySelectorAll(".plot")) {
  const line = plot.querySelector("path.cursor");
  const spots = line.cloneNode();
  spots.classList.add("spots");
  line.after(spots);
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  plot.append(tip);
  for (const strip of plot.querySelectorAll("rect.hit")) {
    const title = strip.querySelector("title");
    strip.dataset.words = title.textContent;
    title.remove();
  }
  const hide = () => {
    tip.hidden = true;
    line.setAttribute("d", "");
    spots.setAttribute("d", "");
  };
  const show = (event) => {
    const strip = event.target.closest("rect.hit");
    if (!strip) return;
    const { x, y, words } = strip.dataset;
    line.setAttribute("d", `M${x} 0V1000`);
    spots.setAttribute("d", y.split(" ").filter(Boolean).map((place) => `M${x} ${place}h0`).join(""));
    tip.textContent = words;
    tip.hidden = false;
    const frame = plot.querySelector("svg.frame").getBoundingClientRect();
    const left = frame.left - plot.getBoundingClientRect().left + (frame.width * x) / 1000;
    const room = plot.clientWidth - tip.offsetWidth - 4;
    tip.style.left = `${Math.max(4, Math.min(room, x > 500 ? left - tip.offsetWidth - 12 : left + 12))}px`;
  };
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
  plot.addEventListener("pointerleave", hide);
}
// The newest samples are what one came for; the older ones are a swipe away.
for (const strip of document.querySelectorAll(".strip:not(.from-left)")) strip.scrollLeft = strip.scrollWidth;
