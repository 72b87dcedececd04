"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const pictures = JSON.parse(document.getElementById("data").textContent);

  // charts: the nearest x under the pointer, or the next one by arrow keys
  for (const svg of all("svg[data-stops]")) {
    const stops = JSON.parse(svg.dataset.stops);
    const cursor = svg.querySelector(".cursor");
    const output = svg.parentElement.querySelector("output");
    let at = stops.length - 1;
    const show = (index) => {
      at = Math.max(0, Math.min(stops.length - 1, index));
      const [x, words] = stops[at];
      cursor.setAttribute("x1", x);
      cursor.setAttribute("x2", x);
      cursor.setAttribute("visibility", "visible");
      output.textContent = words;
    };
    const hide = () => {
      cursor.setAttribute("visibility", "hidden");
      output.textContent = "\u00a0";
    };
    if (!stops.length) continue;
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
      let nearest = 0;
      stops.forEach((stop, index) => {
        if (Math.abs(stop[0] - x) < Math.abs(stops[nearest][0] - x)) nearest = index;
      });
      show(nearest);
    });
    svg.addEventListener("pointerleave", hide);
    svg.addEventListener("focus", () => show(at));
    svg.addEventListener("blur", hide);
    svg.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1, Home: -stops.length, End: stops.length }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      show(at + step);
    });
  }

  // strips: one of several frames
  for (const range of all("input[data-scrub]")) {
    const section = range.closest("section");
    const names = JSON.parse(range.dataset.names);
    range.addEventListener("input", () => {
      all("[data-frame]", section).forEach((frame, index) => (frame.hidden = index !== Number(range.value)));
      section.querySelector("label output").textContent = names[range.value];
      range.setAttribute("aria-valuetext", `iteration ${names[range.value]}`);
    });
  }

  // held-out pictures: before and after in one place, at any time
  for (const range of all("input.cut"))
    range.addEventListener("input", () => range.parentElement.style.setProperty("--cut", `${range.value}%`));
  const time = document.getElementById("scrub-pictures");
  if (time) {
    const sort = document.getElementById("sort");
    const gallery = document.querySelector(".gallery");
    time.addEventListener("input", () => {
      const now = pictures.times[time.value];
      document.querySelector("#pictures label output").textContent = now.name;
      time.setAttribute("aria-valuetext", now.name);
      for (const card of all("article", gallery)) {
        const index = card.dataset.index;
        const over = card.querySelector(".over");
        over.src = now.urls[index];
        over.alt = `${now.name}: ${pictures.prompts[index]}`;
        card.querySelector(".after").textContent = now.rewards[index];
        const change = card.querySelector("b");
        change.textContent = now.changes[index];
        change.className = ["down", "even", "up"][now.signs[index] + 1];
      }
    });
    sort.addEventListener("change", () => {
      const order = sort.value === "own" ? pictures.prompts.map((_, index) => index) : [...pictures.order];
      if (sort.value === "up") order.reverse();
      const cards = new Map(all("article", gallery).map((card) => [Number(card.dataset.index), card]));
      gallery.append(...order.map((index) => cards.get(index)));
    });
  }

  // served by `watch`: look for a newer page, and come back to where the reader was
  const live = document.documentElement.dataset.live;
  if (!live) return;
  const kept = () => all("input[type=range], select").map((input) => input.value);
  const last = JSON.parse(sessionStorage.getItem("kept") || "null");
  if (last) {
    all("input[type=range], select").forEach((input, index) => {
      // a scrubber that stood at its end stays at the end
      if (index >= last.values.length || (input.max !== "" && last.ends[index])) return;
      input.value = last.values[index];
      input.dispatchEvent(new Event(input.tagName === "SELECT" ? "change" : "input"));
    });
    all("details").forEach((details, index) => (details.open = Boolean(last.open[index])));
    window.scrollTo(0, last.scroll);
    sessionStorage.removeItem("kept");
  }
  const label = document.getElementById("live");
  setInterval(async () => {
    try {
      const reply = await fetch("version", { cache: "no-store" });
      const now = await reply.text();
      label.textContent = "live";
      if (!reply.ok || now === live) return;
      const inputs = all("input[type=range], select");
      const state = {
        values: kept(),
        ends: inputs.map((input) => input.max !== undefined && input.value === input.max),
        open: all("details").map((details) => details.open),
        scroll: window.scrollY,
      };
      sessionStorage.setItem("kept", JSON.stringify(state));
      location.reload();
    } catch {
      label.textContent = "not connected";
    }
  }, 3000);
})();
