// Where two answers differ.

/**
 * Mark the tokens of two answers that are not in their longest common subsequence.
 *
 * Returns the marks of both, and the index of the first token that differs; null if the answers are equal.
 */
export function differences(left, right) {
  let start = 0;
  while (start < left.length && start < right.length && left[start] === right[start]) start++;
  const first = start === left.length && start === right.length ? null : start;
  const rows = left.length - start;
  const columns = right.length - start;
  // lengths[i * (columns + 1) + j]: of the longest common subsequence of left from i and right from j.
  const lengths = new Uint16Array((rows + 1) * (columns + 1));
  const at = (i, j) => i * (columns + 1) + j;
  for (let i = rows - 1; i >= 0; i--)
    for (let j = columns - 1; j >= 0; j--)
      lengths[at(i, j)] =
        left[start + i] === right[start + j]
          ? lengths[at(i + 1, j + 1)] + 1
          : Math.max(lengths[at(i + 1, j)], lengths[at(i, j + 1)]);
  const marks = { left: left.map((_, i) => i >= start), right: right.map((_, j) => j >= start), first };
  for (let i = 0, j = 0; i < rows && j < columns; ) {
    if (left[start + i] === right[start + j]) {
      marks.left[start + i++] = false;
      marks.right[start + j++] = false;
    } else if (lengths[at(i + 1, j)] >= lengths[at(i, j + 1)]) i++;
    else j++;
  }
  return marks;
}
