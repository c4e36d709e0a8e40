// The keys of the review press its buttons, while these are seen and nobody is typing.
document.addEventListener("keydown", (event) => {
  const other = event.repeat || event.ctrlKey || event.altKey || event.metaKey;
  if (other || event.target.closest("input, textarea, select, [contenteditable]")) return;
  const names = { a: "Accept", r: "Reject", n: "Next", p: "Previous" };
  const button = document.getElementById(names[event.key.toLowerCase()]);
  if (button?.offsetParent) button.click();
});
