"use strict";
const form = document.getElementById("filter");
const items = [...document.querySelectorAll("[data-item]")];
const isReason = new Set([...document.querySelectorAll("#dropped [data-tag]")].map((item) => item.dataset.tag));

function show(element, visible) {
  element.toggleAttribute("data-hidden", !visible);
  return visible;
}

// A reason chooses among the dropped rows and a flag among the examples; a text among both.
function matches(item, source, tag, text) {
  if (source && item.dataset.source !== source) return false;
  const dropped = "tag" in item.dataset && item.matches("details");
  const example = item.matches("article");
  if (tag && dropped && isReason.has(tag) && item.dataset.tag !== tag) return false;
  if (tag && example && !isReason.has(tag) && !item.dataset.tag.split(" ").includes(tag)) return false;
  if (!text) return true;
  const has = (element) => element.textContent.toLowerCase().includes(text);
  if (dropped) return [...item.querySelectorAll("[data-text]")].filter((row) => show(row, has(row))).length > 0;
  return !example || has(item);
}

function apply() {
  const source = form.source.value, tag = form.tag?.value ?? "", text = form.text.value.trim().toLowerCase();
  document.querySelectorAll("#dropped [data-text]").forEach((row) => show(row, true));
  const shown = items.filter((item) => show(item, matches(item, source, tag, text)));
  const count = (selector) => `${shown.filter((item) => item.matches(selector)).length} of ${document.querySelectorAll(selector).length}`;
  form.querySelector("output").textContent = source || tag || text
    ? `${count("#dropped [data-item]")} kinds of dropped rows, ${count("article")} examples` : "";
}

form.hidden = false;
form.addEventListener("input", apply);
form.addEventListener("submit", (event) => event.preventDefault());
apply();

const borders = document.getElementById("borders");
borders.hidden = false;
borders.addEventListener("change", (event) => document.body.classList.toggle("borders", event.target.checked));

// Touch screens show no `title`, so a tap says what it says.
const tip = document.getElementById("tip");
document.addEventListener("click", (event) => {
  const token = event.target.closest(".text span");
  tip.hidden = !token;
  tip.textContent = token ? token.title : "";
});

window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((item) => { item.open = true; }));
