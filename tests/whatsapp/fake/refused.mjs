/** What was asked of the fake cannot be done; the message says why and what to do. */
export class Refused extends Error {}
