'use strict';
// A search field over each table of texts; without this script all rows are there anyway.
for (const box of document.querySelectorAll('[data-search]')) {
  const rows = [...box.querySelectorAll('tbody tr')].map(row => [row, row.textContent.toLowerCase()]);
  const field = Object.assign(document.createElement('input'), {
    type: 'search', className: 'search', placeholder: `Search ${rows.length} rows`,
  });
  field.setAttribute('aria-label', `Search: ${box.querySelector('caption')?.textContent ?? 'rows'}`);
  const found = document.createElement('output');
  field.addEventListener('input', () => {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const [row, text] of rows) {
      row.hidden = !words.every(word => text.includes(word));
      shown += !row.hidden;
    }
    found.textContent = words.length ? `${shown} of ${rows.length} rows` : '';
  });
  box.before(field, found);
}
// What a mark shows, beside the pointer or the finger; without this script browsers show <title> on hover.
const tip = Object.assign(document.createElement('div'), {id: 'tip', hidden: true});
document.body.append(tip);
for (const title of document.querySelectorAll('svg [href] > title, svg path > title')) {
  title.parentNode.dataset.tip = title.textContent;
  title.remove();
}
document.addEventListener('pointerover', event => {
  const text = event.target.dataset?.tip;
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  const left = Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 8);
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${Math.max(8, event.clientY - tip.offsetHeight - 10)}px`;
});
